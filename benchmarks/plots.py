"""Plots of docs/performance.md, as SVG files that are the same for the same rows."""

import statistics
from pathlib import Path
from typing import Any

import altair as alt

from skipwise.report.page import write_picture
from skipwise.report.vega import color_by, data_of, finished_chart

Rows = list[dict[str, Any]]


def draw_lengths(rows: Rows, path: Path) -> None:
    """Seconds and memory of a step by target length (Figure 3 of the PoSE paper)."""
    points: Rows = []
    for row in rows:
        method = "full length" if row["train_length"] == row["target_length"] else "PoSE"
        at = {"method": method, "target": row["target_length"]}
        points.append({**at, "what": "seconds of a step", "value": statistics.median(row["seconds"])})
        points.append({**at, "what": "peak memory of a step, MiB", "value": row["peak_megabytes"]})
    scale = alt.Scale(type="log", base=2, nice=False)
    lines = data_of(points).mark_line(point=True).encode(
        x=alt.X("target:Q", scale=scale, title="target length, tokens"),
        y=alt.Y("value:Q", scale=scale, title=None),
        color=color_by("method"),
    )  # fmt: skip
    _save(lines.properties(width=300, height=220), "what", points, path)


def draw_qualities(found: Rows, path: Path) -> None:
    """Perplexity and passkey at the target over the time of a training and over its steps, one line per recipe."""
    sides = (
        ("perplexity at 4,096 tokens, by seconds", "perplexity_4096", 1, True),
        ("perplexity at 4,096 tokens, by steps", "perplexity_4096", 1, False),
        ("passkeys found at 4,096 tokens, %, by seconds", "passkey_4096", 100, True),
    )
    points: Rows = []
    for one in found:
        recipe = one["recipe"]
        label = "full length" if recipe.method == "full" else f"PoSE, windows of {recipe.train_length}"
        points += [
            {
                "recipe": recipe.name,
                "method": label,
                "what": title,
                "along": row["step"] * (one["seconds"] if timed else 1),
                "value": scale * row[key],
            }
            for title, key, scale, timed in sides
            for row in one["rows"]
        ]
    lines = data_of(points).mark_line(opacity=0.8).encode(
        x=alt.X("along:Q", title=None),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        color=color_by("method"),
        detail="recipe:N",
    )  # fmt: skip
    _save(lines.properties(width=280, height=220), "what", points, path)


def _save(drawn: Any, panel: str, points: Rows, path: Path) -> None:
    panels = drawn.facet(facet=alt.Facet(f"{panel}:N", title=None, sort=None), columns=3)
    panels = panels.resolve_scale(x="independent", y="independent")
    write_picture(finished_chart(path.stem, path.stem, "", points, panels, wide=False), path)
