"""A study's summary as Markdown tables and as one HTML page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from skipwise.evaluation.specs import main_metric
from skipwise.lengths import format_length
from skipwise.report.charts import by_length_chart, difference_chart
from skipwise.report.page import Card, render
from skipwise.report.tables import as_text, markdown_table
from skipwise.report.vega import Chart, color_by, data_of, finished_chart, tooltips
from skipwise.utils.files import write_text

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def study_markdown(summary: Summary) -> str:
    """Every result, a table for each evaluation and domain; then the differences from the reference."""
    parts = [_heading(summary)]
    for (evaluation, domain), rows in _grouped(summary["figures"], "evaluation", "domain").items():
        lengths = sorted({row["context_length"] for row in rows})
        header = ["method", *map(format_length, lengths)]
        body = []
        for arm, own in _by_arm(rows).items():
            cells = {row["context_length"]: row for row in own}
            body.append([arm, *(_cell(cells.get(length)) for length in lengths)])
        parts.append(f"## {evaluation.replace('_', ' ')}, {domain}\n\n{markdown_table(header, body)}")
    compared = [row for row in summary["figures"] if row.get("over_reference")]
    if compared:
        parts.append(_differences(compared, summary))
    if summary["learning_rates"]:
        parts.append(_rates(summary["learning_rates"]))
    if summary["failed"]:
        lines = (
            f"- {one['cell']}, {one['domain']}, {one['figure']}: {as_text(one['reason'])}" for one in summary["failed"]
        )
        parts.append("## Failed\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _heading(summary: Summary) -> str:
    lengths = [f"{summary[key]:,}" for key in ("original_length", "train_length", "target_length")]
    seeds, planned = (", ".join(map(str, summary[key])) or "none" for key in ("seeds", "planned_seeds"))
    unfinished = "" if seeds == planned else f" of {planned}: this study is not finished"
    return (
        f"# {as_text(summary['model'])}: {lengths[0]} to {lengths[2]} tokens in windows of {lengths[1]}\n\n"
        f"Seeds {seeds}{unfinished}. Brackets are 95 % intervals over seeds and documents."
    )


def _differences(rows: Sequence[Row], summary: Summary) -> str:
    header = ["evaluation", "domain", "length", "method", f"over {summary['reference']}", "p", "p, Holm"]
    body = [
        [
            row["evaluation"].replace("_", " "),
            row["domain"],
            format_length(row["context_length"]),
            row["arm"],
            _value(row["over_reference"], _is_loss(row["evaluation"]), difference=True),
            *(_p(row.get(key)) for key in ("p_value", "p_value_holm")),
        ]
        for row in rows
    ]
    return (
        f"## Beside {as_text(summary['reference'])}\n\n"
        "Perplexities as ratios (below 1 is better), scores as differences.\n\n"
        f"{markdown_table(header, body)}"
    )


def _rates(rates: Sequence[Row]) -> str:
    body = [
        [row["arm"], f"{row['learning_rate']:g}{' (end of the grid)' if row['at_edge'] else ''}",
         ", ".join(f"{rate:g}: {value:.4g}" for rate, value in row["tried"])]
        for row in rates
    ]  # fmt: skip
    return f"## Learning rates, chosen in development\n\n{markdown_table(['method', 'chosen', 'tried'], body)}"


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cell(row: Row | None) -> str:
    return "-" if row is None else _value(row, _is_loss(row["evaluation"]))


def _value(row: Row, loss: bool, difference: bool = False) -> str:
    def shown(value: float) -> str:
        if loss:
            return f"{value:.3f}" if difference else f"{value:,.2f}" if value < 1e4 else f"{value:.1e}"
        return f"{100 * value:+.1f}" if difference else f"{100 * value:.1f} %"

    text = shown(row["value"])
    if row["interval"] is None:
        return text
    low, high = (shown(bound).removesuffix(" %") for bound in row["interval"])
    return f"{text} [{low}, {high}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _is_loss(evaluation: str) -> bool:
    return not main_metric(evaluation).higher_is_better


def write_study_page(
    summary: Summary,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    command: str,
    config: str,
    environments: Sequence[Mapping[str, Any]],
    output: Path,
) -> list[Chart]:
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
    charts = [*_results(summary), *_difference_charts(summary), *_losses(losses), *_rate_tables(summary)]
    write_text(output, render(f"Study of {summary['model']}", [card], charts))
    return charts


def _verdict(summary: Summary) -> str:
    """How many differences from the reference are beyond chance."""
    compared = [row for row in summary["figures"] if row.get("p_value_holm") is not None]
    beyond = [row for row in compared if row["p_value_holm"] < 0.05]
    return (
        f"{len(beyond)} of {len(compared)} differences from {summary['reference']} are beyond chance after correction"
    )


def _results(summary: Summary) -> Iterator[Chart]:
    """A chart for each evaluation, with a panel for each domain."""
    for evaluation in dict.fromkeys(row["evaluation"] for row in summary["figures"]):
        rows: list[dict[str, Any]] = [
            {"method": row["arm"], "domain": row["domain"], "context": row["context_length"], "value": row["value"],
             **dict(zip(("low", "high"), row["interval"] or (None, None), strict=True)), "seeds": row["seeds"]}
            for row in summary["figures"]
            if row["evaluation"] == evaluation
        ]  # fmt: skip
        caption = "strokes are 95 % intervals over seeds and documents."
        yield by_length_chart(evaluation, main_metric(evaluation), rows, caption)


def _difference_charts(summary: Summary) -> Iterator[Chart]:
    """Every method compared with the reference at the target."""
    rows: list[dict[str, Any]] = [
        {"figure": f"{row['evaluation'].replace('_', ' ')} at {format_length(row['context_length'])}, {row['domain']}",
         "method": row["arm"], "difference": row["over_reference"]["value"],
         "none": 1.0 if _is_loss(row["evaluation"]) else 0.0,
         **dict(zip(("low", "high"), row["over_reference"]["interval"] or (None, None), strict=True)),
         "p": row.get("p_value"), "p, Holm": row.get("p_value_holm")}
        for row in summary["figures"]
        if row.get("over_reference") and row["context_length"] == summary["target_length"]
    ]  # fmt: skip
    if rows:
        caption = (
            f"At the target, compared with {summary['reference']}: perplexities as ratios (below 1 is better), scores "
            "as differences (above 0 is better). Bars are 95 % intervals of what is paired by seed and document."
        )
        yield difference_chart(summary["reference"], rows, caption)


def _losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Iterator[Chart]:
    rows: list[dict[str, Any]] = [
        {"method": arm, "step": step, "loss": loss} for arm, points in losses.items() for step, loss in points
    ]
    if rows:
        lines = data_of(rows).mark_line().encode(
            x="step:Q", y=alt.Y("loss:Q", scale=alt.Scale(zero=False)), color=color_by("method"), tooltip=tooltips(rows)
        )  # fmt: skip
        yield finished_chart("losses", "Training", "Mean loss of the seeds, in nats per token.", rows, lines)


def _rate_tables(summary: Summary) -> Iterator[Chart]:
    rows: list[dict[str, Any]] = [
        {"method": rate["arm"], "chosen": f"{rate['learning_rate']:g}",
         "end of the grid": "yes" if rate["at_edge"] else "",
         "tried": ", ".join(f"{one:g}: {value:.4g}" for one, value in rate["tried"])}
        for rate in summary["learning_rates"]
    ]  # fmt: skip
    if rows:
        caption = "From one grid for all methods, on seeds and documents that are not reported."
        yield Chart("rates", "Learning rates", caption, rows, None)
