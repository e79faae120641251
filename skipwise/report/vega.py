"""Parts that all charts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from skipwise.runs.record import Row


@dataclass(frozen=True)
class Chart:
    """One chart of a report.

    Attributes:
        key: short name, for anchors and files.
        title: of its section.
        caption: what one sees, in a sentence or two.
        rows: the numbers behind it, as they are drawn.
        spec: Vega-Lite, with the rows in it; None for a table alone.
    """

    key: str
    title: str
    caption: str
    rows: Sequence[Row]
    spec: dict[str, Any] | None


def length_axis(field: str, rows: Sequence[Row]) -> alt.X:
    """Lengths are doubled, so their axis is logarithmic; it has these lengths on it."""
    scale = alt.Scale(type="log", base=2, nice=False, padding=12)
    axis = alt.Axis(format=",", values=sorted({row[field] for row in rows}))
    return alt.X(f"{field}:Q", scale=scale, title="context length, tokens", axis=axis)


def number_axis(field: str, title: str) -> alt.X:
    """From the first to the last, with labels that have room."""
    axis = alt.Axis(format=",d", tickCount=8, labelOverlap="greedy")
    return alt.X(f"{field}:Q", scale=alt.Scale(nice=False), title=title, axis=axis)


def stroke_legend() -> alt.Legend:
    """Of dashes, which points would hide."""
    return alt.Legend(symbolType="stroke", symbolSize=600, symbolStrokeWidth=2)


def data_of(rows: Sequence[Row]) -> alt.Chart:
    """A chart of these rows, in which nothing is drawn yet."""
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]


def tooltips(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Every column, by its name."""
    numbers = {key for key, value in rows[0].items() if isinstance(value, int | float)}
    return [alt.Tooltip(f"{key}:{'Q' if key in numbers else 'N'}") for key in rows[0]]


def color_by(field: str) -> alt.Color:
    """A colour for each value of a column, in the order of the rows."""
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(scheme="tableau10"), sort=None)


def finished_chart(
    key: str, title: str, caption: str, rows: Sequence[Mapping[str, Any]], drawn: Any, wide: bool = True
) -> Chart:
    """A chart with its title, caption and rows.

    Args:
        wide: as wide as the page, which charts of several panels cannot be.
    """
    if wide:
        drawn = drawn.properties(width="container", height=300)
    spec: dict[str, Any] = drawn.to_dict()
    spec["description"] = f"{title}. {caption}"
    return Chart(key, title, caption, [dict(row) for row in rows], spec)
