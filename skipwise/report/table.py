"""Tables for the terminal and for Markdown."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from skipwise.evaluation.specs import EvalResult
from skipwise.lengths import format_length

# A column of the comparison: its heading, and the rows it shows.
Columns = Mapping[str, Sequence[EvalResult]]


def stage_columns(rows: Sequence[EvalResult], trained: str = "extended") -> dict[str, list[EvalResult]]:
    """One column per stage that was measured; `trained` is the heading of the last."""
    headings = {"original": "original", "interpolated": "interpolated", "extended": trained}
    columns = {heading: [row for row in rows if row.stage == stage] for stage, heading in headings.items()}
    return {heading: own for heading, own in columns.items() if own}


def comparison(columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Header and body: one line per evaluation and context length, pooled over depths."""
    pooled = {
        heading: {(row.evaluation, row.context_length): row for row in rows if row.depth is None}
        for heading, rows in columns.items()
    }
    keys = sorted({key for own in pooled.values() for key in own})
    body = [
        [name.replace("_", " "), format_length(length), *(_cell(own.get((name, length))) for own in pooled.values())]
        for name, length in keys
    ]
    return ["evaluation", "context", *pooled], body


def comparison_table(title: str, columns: Columns) -> Table:
    """`comparison` for the terminal, with what its signs mean below."""
    header, body = comparison(columns)
    notes = []
    rows = [row for own in columns.values() for row in own]
    if any(row.status == "beyond_window" for row in rows):
        notes.append("* longer than the window of that model")
    notes.append("± half a 95 % interval")
    table = Table(title=title, caption="; ".join(notes), title_justify="left", caption_justify="left")
    for number, heading in enumerate(header):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for previous, line in zip([None, *body], body, strict=False):
        if previous is not None and previous[0] != line[0]:
            table.add_section()
        table.add_row(*line)
    return table


def comparison_markdown(columns: Columns) -> str:
    """`comparison` as a Markdown table."""
    header, body = comparison(columns)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *body])


def pairs_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Two columns without lines: what, and how much."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, value in pairs:
        table.add_row(what, value)
    return table


def _cell(row: EvalResult | None) -> str:
    if row is None:
        return "-"
    if row.value is None:
        return "failed"
    mark = "*" if row.status == "beyond_window" else ""
    if row.metric == "accuracy":
        half = _half_width(row)
        return f"{row.value:.0%}{f' ± {half:.0%}' if half is not None else ''}{mark}"
    half = _half_width(row)
    shown = f"{row.value:,.2f}" if row.value < 1e5 else f"{row.value:.1e}"
    return f"{shown}{f' ± {half:,.2f}' if half is not None and half < 1e5 else ''}{mark}"


def _half_width(row: EvalResult) -> float | None:
    if row.interval_low is None or row.interval_high is None:
        return None
    return (row.interval_high - row.interval_low) / 2
