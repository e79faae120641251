"""Tables for the terminal and for Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from skipwise.evaluation.metrics import metric_of
from skipwise.evaluation.results import EvalResult
from skipwise.evaluation.statistics import Result
from skipwise.lengths import format_length

DIFFERENCE_NOTE = "95 % interval of the paired difference in brackets"
# A column of the comparison: its heading, and the rows it shows.
Columns = Mapping[str, Sequence[EvalResult]]


def stage_columns(rows: Sequence[EvalResult], trained: str = "extended") -> dict[str, list[EvalResult]]:
    """One column per stage that was measured; `trained` is the heading of the last."""
    headings = {"original": "original", "interpolated": "interpolated", "extended": trained}
    columns = {heading: [row for row in rows if row.stage == stage] for stage, heading in headings.items()}
    return {heading: own for heading, own in columns.items() if own}


def comparison(columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Header and body: one line per evaluation, metric and context length, pooled over depths.

    Bits per byte are for models that cut the text into different tokens, and only then shown.
    """
    pooled = {
        heading: {(row.evaluation, row.metric, row.context_length): row for row in rows if row.depth is None}
        for heading, rows in columns.items()
    }
    keys = {key for own in pooled.values() for key in own}
    shown = {key for key in keys if key[1] != "bits_per_byte" or _other_tokens(key, pooled.values())}
    body = [
        [_label(*key[:2]), _context(key[2]), *(_cell(own.get(key)) for own in pooled.values())]
        for key in sorted(shown, key=lambda key: (*key[:2], key[2] or 0))
    ]
    return ["evaluation", "context", *pooled], body


Key = tuple[str, str, int | None]


def _other_tokens(key: Key, pooled: Iterable[Mapping[Key, EvalResult]]) -> bool:
    perplexity = (key[0], "perplexity", key[2])
    return len({own[perplexity].num_samples for own in pooled if perplexity in own}) > 1


def _label(evaluation: str, metric: str) -> str:
    """`"passkey"`, `"ruler/vt"`, `"summarization rougeL"`: the metric only where it is not understood."""
    suite, slash, task = evaluation.partition("/")
    label = suite.replace("_", " ") + slash + task
    return label if metric_of(metric).understood else f"{label} {metric.replace('_', ' ')}"


def _suite(label: str) -> str:
    return label.partition("/")[0].partition(" rouge")[0]


def _context(length: int | None) -> str:
    return "" if length is None else format_length(length)


Differences = Mapping[str, Mapping[tuple[str, int | None], Result]]


def difference_lines(differences: Differences) -> tuple[list[str], list[list[str]]]:
    """Header and body: how far each model is above the first, by evaluation, metric and context length."""
    keys = {(name, result["metric"], length) for own in differences.values() for (name, length), result in own.items()}
    body = []
    for name, metric, length in sorted(keys, key=lambda key: (*key[:2], key[2] or 0)):
        cells = [own.get((name, length)) for own in differences.values()]
        shown = [_difference(cell) if cell is not None and cell["metric"] == metric else "-" for cell in cells]
        body.append([_label(name, metric), _context(length), *shown])
    return ["evaluation", "context", *differences], body


def difference_table(first: str, differences: Differences) -> Table:
    """`difference_lines` for the terminal."""
    header, body = difference_lines(differences)
    table = Table(
        title=Text(f"Difference from {first}"), caption=DIFFERENCE_NOTE, title_justify="left", caption_justify="left"
    )
    for number, heading in enumerate(header):
        table.add_column(Text(heading), justify="left" if number == 0 else "right")
    for line in body:
        table.add_row(*map(Text, line))
    return table


def evaluation_markdown(columns: Columns, first: str, differences: Differences) -> str:
    """Models side by side, how they differ, and what failed."""
    parts = [comparison_markdown(columns)]
    if differences:
        parts += [
            f"Difference from {as_text(first)} ({DIFFERENCE_NOTE}):\n",
            markdown_table(*difference_lines(differences)) + "\n",
        ]
    failed = {(row.evaluation, row.reason) for rows in columns.values() for row in rows if row.status == "failed"}
    parts += [f"Failed: {name}: {as_text(str(reason))}\n" for name, reason in sorted(failed, key=str)]
    return "\n".join(parts)


def _difference(result: Result) -> str:
    write = metric_of(result["metric"]).difference
    return f"{write(result['value'])} [{write(result['interval_low'])}, {write(result['interval_high'])}]"


def comparison_table(title: str, columns: Columns) -> Table:
    """`comparison` for the terminal, with what its signs mean below."""
    header, body = comparison(columns)
    table = Table(title=Text(title), caption="; ".join(_notes(columns)), title_justify="left", caption_justify="left")
    for number, heading in enumerate(header):
        table.add_column(Text(heading), justify="left" if number == 0 else "right")
    for previous, line in zip([None, *body], body, strict=False):
        if previous is not None and _suite(previous[0]) != _suite(line[0]):
            table.add_section()
        table.add_row(*map(Text, line))
    return table


def comparison_markdown(columns: Columns) -> str:
    """`comparison` as a Markdown table, with what its signs mean below."""
    notes = "; ".join(_notes(columns)).replace("*", r"\*")  # at the beginning of a line it makes a list
    return "\n".join([markdown_table(*comparison(columns)), *["", f"{notes}."] * bool(notes)]) + "\n"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A column of names and columns of results; what is in a cell stays in it, and is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    rows = [[as_text(cell) for cell in line] for line in (header, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (rows[0], rule, *rows[1:]))


def as_text(text: str) -> str:
    """In Markdown, on one line, without HTML, links, code or cells of its own."""
    return re.sub(r"([\\`<>|]|\](?=\())", r"\\\1", " ".join(text.split()))


def _notes(columns: Columns) -> list[str]:
    """What the signs in a comparison mean."""
    cells = [cell for line in comparison(columns)[1] for cell in line[2:]]
    notes = {
        "*": "* longer than the window of that model",
        "±": "± half a 95 % interval",
        "[": "[] the bounds of a 95 % interval",
    }
    return [note for sign, note in notes.items() if any(sign in cell for cell in cells)]


def depth_table(heading: str, rows: Sequence[EvalResult]) -> Table | None:
    """Accuracy of one model by depth and context length; None unless there are several depths."""
    cells = {(row.depth, row.context_length): row for row in rows if row.depth is not None}
    lengths = sorted({length for _, length in cells if length is not None})
    depths = sorted({depth for depth, _ in cells})
    if len(depths) < 2:
        return None
    table = Table(title=Text(f"Passkey by depth: {heading}"), title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(format_length(length), justify="right")
    for depth in depths:
        found = [cells.get((depth, length)) for length in lengths]
        table.add_row(
            f"{depth:.0%}", *("-" if row is None or row.value is None else f"{row.value:.0%}" for row in found)
        )
    return table


def pairs_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Two columns without lines: what, and how much."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, value in pairs:
        table.add_row(Text(what), Text(value))
    return table


def warning(text: str) -> Text:
    """A line that deserves a second look."""
    return Text.assemble(("Warning:", "yellow"), f" {text}")


def plain_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """A column of names, and columns of results."""
    table = Table(title=Text(title), title_justify="left")
    for number, heading in enumerate(header):
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=not number)
    for cells in body:
        table.add_row(*map(Text, cells))
    return table


def _cell(row: EvalResult | None) -> str:
    if row is None:
        return "-"
    if row.value is None:
        return "failed"
    mark = "*" if row.status == "beyond_window" else ""
    half = _half_width(row)
    metric = metric_of(row.metric)
    if metric.share and 0 <= row.value <= 1:
        digits = metric.digits
        shown = f"{row.value:.{digits}%}"
        if half is not None and not half <= row.value <= 1 - half:  # ± would leave what a share can be
            assert row.interval_low is not None and row.interval_high is not None
            shown += f" [{100 * row.interval_low:.{digits}f}, {100 * row.interval_high:.{digits}f}]"
        elif half is not None:
            shown += f" ± {half:.{digits}%}"
        return f"{shown}{mark}"
    shown = _number(row.value)
    if half is not None and half > row.value / 2:  # one far bound would make ± say nothing about the other
        return f"{shown} [{_number(row.interval_low)}, {_number(row.interval_high)}]{mark}"
    return f"{shown}{f' ± {half:,.2f}' if half is not None and half < 1e5 else ''}{mark}"


def _number(value: float | None) -> str:
    assert value is not None, "an interval has both bounds"
    return f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def _half_width(row: EvalResult) -> float | None:
    if row.interval_low is None or row.interval_high is None:
        return None
    return (row.interval_high - row.interval_low) / 2
