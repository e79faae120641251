"""A study as one HTML page: every figure by context length, differences from the reference, learning rates."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from skipwise.lengths import format_length
from skipwise.report.charts import Chart, color_by, data_of, finished_chart, length_axis, tooltips
from skipwise.report.page import Card, render
from skipwise.report.run import Row
from skipwise.report.study import LOSSES
from skipwise.runs import write_text


def write_study_page(
    summary: Mapping[str, Any],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    command: str,
    config: str,
    environments: Sequence[Mapping[str, Any]],
    output: Path,
) -> None:
    """Write the page of a study.

    Args:
        summary: of it, as in `summary.json`.
        losses: by arm, mean training loss by step.
        command: that repeats it.
        config: the study file.
        environments: in which its cells were measured.
        output: the HTML file.
    """
    lengths = f"{summary['original_length']:,} to {summary['target_length']:,} tokens"
    arms = list(dict.fromkeys(row["arm"] for row in summary["figures"]))
    seeds = ", ".join(map(str, summary["seeds"])) or "none"
    card = Card(
        name=summary["model"],
        verdict=f"{lengths}, trained on windows of {summary['train_length']:,}: {_verdict(summary)}.",
        warnings=[f"{one['cell']}, {one['domain']}, {one['figure']}: {one['reason']}" for one in summary["failed"]],
        facts=[("methods", "; ".join(arms)), ("seeds", seeds), ("compared with", summary["reference"])],
        command=command,
        config=config,
        environment="\n".join(json.dumps(one, indent=2) for one in environments),
    )
    charts = [*_figures(summary), *_differences(summary), *_losses(losses), *_rates(summary)]
    write_text(output, render(f"Study of {summary['model']}", [card], charts))


def _verdict(summary: Mapping[str, Any]) -> str:
    """How many differences from the reference are beyond chance."""
    compared = [row for row in summary["figures"] if row.get("p_value_holm") is not None]
    beyond = [row for row in compared if row["p_value_holm"] < 0.05]
    return (
        f"{len(beyond)} of {len(compared)} differences from {summary['reference']} are beyond chance after correction"
    )


def _figures(summary: Mapping[str, Any]) -> Iterator[Chart]:
    """A chart for each evaluation, with a panel for each domain."""
    for evaluation in dict.fromkeys(row["evaluation"] for row in summary["figures"]):
        rows: list[Row] = [
            {"method": row["arm"], "domain": row["domain"], "context": row["context_length"], "value": row["value"],
             **dict(zip(("low", "high"), row["interval"] or (None, None), strict=True)), "seeds": row["seeds"]}
            for row in summary["figures"]
            if row["evaluation"] == evaluation
        ]  # fmt: skip
        loss, name = evaluation in LOSSES, evaluation.replace("_", " ")
        value = alt.Y(
            "value:Q", title=name, scale=alt.Scale(type="log", nice=False) if loss else alt.Scale(domain=[0, 1])
        )
        base = data_of(rows).encode(x=length_axis("context", rows), color=color_by("method"), tooltip=tooltips(rows))
        intervals = base.mark_rule(opacity=0.4, clip=True).encode(y=alt.Y("low:Q"), y2="high:Q")
        drawn = alt.layer(base.mark_line(point=True).encode(y=value), intervals).properties(width=300, height=240)
        faceted = drawn.facet(facet=alt.Facet("domain:N", title=None), columns=2).resolve_scale(y="independent")
        caption = f"{'Lower' if loss else 'Higher'} is better; strokes are 95 % intervals over seeds and documents."
        yield finished_chart(evaluation, f"{name} by context length".capitalize(), caption, rows, faceted, wide=False)


def _differences(summary: Mapping[str, Any]) -> Iterator[Chart]:
    """Every method beside the reference at the target."""
    rows: list[Row] = [
        {"figure": f"{row['evaluation'].replace('_', ' ')} at {format_length(row['context_length'])}, {row['domain']}",
         "method": row["arm"], "difference": row["over_reference"]["value"],
         **dict(zip(("low", "high"), row["over_reference"]["interval"] or (None, None), strict=True)),
         "p": row.get("p_value"), "p, Holm": row.get("p_value_holm")}
        for row in summary["figures"]
        if row.get("over_reference") and row["context_length"] == summary["target_length"]
    ]  # fmt: skip
    if not rows:
        return
    base = data_of(rows).encode(y=alt.Y("method:N", title=None, sort=None))
    drawn = base.mark_rule().encode(x=alt.X("low:Q", title="difference", scale=alt.Scale(zero=False)), x2="high:Q")
    drawn += base.mark_point(filled=True).encode(x="difference:Q", tooltip=tooltips(rows))
    faceted = drawn.properties(width=300).facet(facet=alt.Facet("figure:N", title=None), columns=2)
    faceted = faceted.resolve_scale(x="independent")
    caption = (
        f"At the target, beside {summary['reference']}: perplexities as ratios (below 1 is better), scores as "
        "differences (above 0 is better). Bars are 95 % intervals of what is paired by seed and document."
    )
    yield finished_chart("differences", f"Beside {summary['reference']}", caption, rows, faceted, wide=False)


def _losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Iterator[Chart]:
    rows: list[Row] = [
        {"method": arm, "step": step, "loss": loss} for arm, points in losses.items() for step, loss in points
    ]
    if rows:
        lines = data_of(rows).mark_line().encode(
            x="step:Q", y=alt.Y("loss:Q", scale=alt.Scale(zero=False)), color=color_by("method"), tooltip=tooltips(rows)
        )  # fmt: skip
        yield finished_chart("losses", "Training", "Mean loss of the seeds, in nats per token.", rows, lines)


def _rates(summary: Mapping[str, Any]) -> Iterator[Chart]:
    rows: list[Row] = [
        {"method": rate["arm"], "chosen": f"{rate['learning_rate']:g}",
         "end of the grid": "yes" if rate["at_edge"] else "",
         "tried": ", ".join(f"{one:g}: {value:.4g}" for one, value in rate["tried"])}
        for rate in summary["learning_rates"]
    ]  # fmt: skip
    if rows:
        caption = "From one grid for all methods, on seeds and documents that are not reported."
        yield Chart("rates", "Learning rates", caption, rows, None)
