"""A study's summary as tables and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.lengths import format_length
from skipwise.report.figures import legend_below, length_axis, new_figure, save_figure, styles
from skipwise.report.table import as_text, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
LOSSES = ("perplexity", "truncated_perplexity", "longppl")


def study_markdown(summary: Summary) -> str:
    """Every figure, a table for each evaluation and domain; then the differences from the reference."""
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
            _value(row["over_reference"], row["evaluation"] in LOSSES, difference=True),
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
    return "-" if row is None else _value(row, row["evaluation"] in LOSSES)


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


def draw_study(summary: Summary, losses: Mapping[str, Sequence[tuple[int, float]]], directory: Path) -> list[Path]:
    """Each evaluation by length with a panel per domain, differences from the reference at the target, losses by step.

    Args:
        summary: of a study.
        losses: by arm, mean training loss by step.
        directory: where the SVG files go.
    """
    written = []
    for (evaluation,), rows in _grouped(summary["figures"], "evaluation").items():
        domains = _grouped(rows, "domain")
        figure = new_figure(4.2 * len(domains) + 1, 5.2)
        for number, ((domain,), own) in enumerate(domains.items(), start=1):
            axes = figure.add_subplot(1, len(domains), number)
            axes.set_title(domain)
            _lines(axes, own, evaluation, summary)
        legend_below(figure, max(2, 2 * len(domains)))
        written.append(save_figure(figure, directory / f"{evaluation}.svg"))
        at = _longest_target(rows, summary)
        compared = [row for row in rows if row.get("over_reference") and row["context_length"] == at]
        if compared:
            written.append(save_figure(_forest(compared, summary), directory / f"{evaluation}-differences.svg"))
    if losses:
        figure = new_figure(8, 5.2)
        axes = figure.add_subplot()
        for (arm, points), style in zip(losses.items(), styles(), strict=False):
            axes.plot(*zip(*points, strict=True), label=arm, **style)
        axes.set(xlabel="training step", ylabel="training loss (nats per token)")
        axes.grid(alpha=0.3)
        legend_below(figure, 3)
        written.append(save_figure(figure, directory / "loss.svg"))
    return written


def _longest_target(rows: Sequence[Row], summary: Summary) -> int:
    """The longest measured length that is not beyond the target."""
    return max((row["context_length"] for row in rows if row["context_length"] <= summary["target_length"]), default=0)


def _forest(rows: Sequence[Row], summary: Summary) -> "Figure":
    """Every arm beside the reference, with 95 % intervals; a panel for each domain."""
    domains = _grouped(rows, "domain")
    arms = list(_by_arm(rows))
    figure = new_figure(3.2 * len(domains) + 2.4, 0.26 * len(arms) + 1.4)
    loss = rows[0]["evaluation"] in LOSSES
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for axes, ((domain,), own) in zip(panels, domains.items(), strict=True):
        for row in own:
            difference = row["over_reference"]
            low, high = difference["interval"] or [difference["value"]] * 2
            height = len(arms) - arms.index(row["arm"])
            axes.plot([low, high], [height] * 2, color="C0", linewidth=1.2)
            axes.plot(difference["value"], height, "o", color="C0", markersize=4)
        axes.axvline(1.0 if loss else 0.0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(domain)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(arms), 0, -1), arms)
    what = f"{rows[0]['evaluation'].replace('_', ' ')} at {format_length(rows[0]['context_length'])}"
    figure.supxlabel(f"{what}: {'over' if loss else 'minus'} that of {summary['reference']}", fontsize=9)
    return figure


def _lines(axes: "Axes", rows: Sequence[Row], evaluation: str, summary: Summary) -> None:
    """One line per arm over the context lengths; intervals, mostly the spread between documents, are in the tables."""
    for (arm, own), style in zip(_by_arm(rows).items(), styles(), strict=False):
        points = sorted(own, key=lambda row: row["context_length"])
        x = [row["context_length"] for row in points]
        y = [row["value"] for row in points]
        axes.plot(x, y, label=arm, marker="o", markersize=3, **style)
    axes.axvline(summary["original_length"], color="grey", linewidth=0.8, linestyle=":")
    length_axis(axes, sorted({row["context_length"] for row in rows}), "context length (tokens)")
    if evaluation in LOSSES:
        # What explodes would press all else together.
        best, worst = (choice(row["value"] for row in rows) for choice in (min, max))
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.95 * best, top=min(8 * best, 1.05 * worst))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("{x:,g}")
        axes.set_ylabel("perplexity")
    else:
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(evaluation.replace("_", " "))
