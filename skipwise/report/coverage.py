"""Which distances samplers show, as a picture (Figure 5 of the PoSE paper)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skipwise.report.figures import legend_below, new_figure, save_figure, styles

if TYPE_CHECKING:
    from skipwise.coverage import Coverage

# Points of a line: a distance more or less is not to be seen.
POINTS = 512


def draw_coverages(found: Mapping[str, "Coverage"], path: Path) -> None:
    """By distance: the probability that a window shows it, and the expected number of pairs that do."""
    figure = new_figure(10, 4)
    seen, pairs = figure.subplots(1, 2)
    for (name, one), style in zip(found.items(), styles(), strict=False):
        groups = np.array_split(np.arange(1, len(one.seen)), min(POINTS, len(one.seen) - 1))
        distance = [group.mean() for group in groups]
        seen.plot(distance, [one.seen[group].mean() for group in groups], label=name, **style)
        pairs.plot(distance, [one.pairs[group].mean() for group in groups], label=name, **style)
    seen.set_title("probability of being seen in a window")
    pairs.set_title("expected pairs of tokens in a window")
    pairs.set_yscale("log")
    for axes in (seen, pairs):
        axes.set_xlabel("relative distance (tokens)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    legend_below(figure, 3)
    save_figure(figure, path)
