"""Plots of docs/performance.md, as SVG files that are the same for the same rows."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

matplotlib.rcParams.update({"svg.hashsalt": "skipwise", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
BLUE, ORANGE, GREY = "#2563eb", "#d97706", "#9ca3af"


def draw_lengths(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory of a step by target length (Figure 3 of the PoSE paper)."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    sides = (("PoSE", BLUE, "o", False), ("full length", ORANGE, "s", True))
    for label, color, marker, full in sides:
        own = [row for row in rows if (row["train_length"] == row["target_length"]) == full]
        targets = [row["target_length"] for row in own]
        seconds = [statistics.median(row["seconds"]) for row in own]
        axes[0].plot(targets, seconds, color=color, marker=marker, label=label)
        axes[1].plot(targets, [row["peak_megabytes"] for row in own], color=color, marker=marker, label=label)
    for axis, title in zip(axes, ("seconds of a step", "peak memory of a step, MiB"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("target length, tokens")
        axis.set_title(title)
        axis.legend()
    _save(figure, path)


def draw_qualities(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity and passkey at the target over the time of a training and over its steps, one line per recipe."""
    sides = [
        ("perplexity at 4,096 tokens", "perplexity_4096", 1, "seconds of training"),
        ("perplexity at 4,096 tokens", "perplexity_4096", 1, "steps of training"),
        ("passkeys found at 4,096 tokens, %", "passkey_4096", 100, "seconds of training"),
    ]
    figure, axes = pyplot.subplots(1, len(sides), figsize=(11, 3.4), layout="constrained")
    labels = set()
    for one in found:
        recipe = one["recipe"]
        label = "full length" if recipe.method == "full" else f"PoSE, windows of {recipe.train_length}"
        color = ORANGE if recipe.method == "full" else {256: BLUE, 128: "#0d9488", 64: "#7c3aed"}.get(
            recipe.train_length, GREY
        )  # fmt: skip
        for axis, (_, key, scale, over) in zip(axes, sides, strict=True):
            along = [row["step"] * (one["seconds"] if over.startswith("seconds") else 1) for row in one["rows"]]
            values = [scale * row[key] for row in one["rows"]]
            axis.plot(along, values, color=color, alpha=0.8, label=None if label in labels else label)
        labels.add(label)
    axes[-1].axhline(95, color="black", linewidth=0.8, linestyle="--")
    for axis, (title, _, _, over) in zip(axes, sides, strict=True):
        axis.set_xlabel(over)
        axis.set_title(title)
    axes[0].legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
