"""CREAM: a middle chunk that moves between a head and a tail (arXiv 2406.07138)."""

import math
from statistics import NormalDist
from typing import Literal

import numpy as np

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions.window import Document, Window
from skipwise.sections import section


@section
class CREAM:
    """Head at the beginning of the target, tail at its end, and the middle somewhere between, mostly at the centre.

    The head keeps positions `0, ..., h - 1`, the tail has the last ones, `Lt - h, ..., Lt - 1`, and the middle ends at
    a position drawn from a Gaussian that is cut off where the middle would touch head or tail. In half of the windows
    head and tail are short, so that most of the window runs on as in pretraining (continuity); in the other half all
    three have the same length, so that more distances are met (relativity).

    The end of the middle is drawn for every example, from the normalised distribution itself.

    Attributes:
        edge: tokens of head and tail where they are short.
        spread: standard deviation of the Gaussian, as a share of the range that the end of the middle can lie in.
    """

    name: Literal["cream"] = "cream"
    edge: int = 32
    spread: float = 0.3

    def __post_init__(self) -> None:
        if self.edge < 1 or not self.spread > 0:
            raise UserError(
                f"CREAM needs an edge of at least 1 token and a spread above 0, not {self.edge} and {self.spread}. "
                "The defaults are 32 and 0.3.",
                code="cream_parameters_out_of_range",
            )

    def check(self, lengths: Lengths) -> None:
        """Raise `UserError` when the window has no room for a middle."""
        if lengths.train < 3 * self.edge:
            raise UserError(
                f"CREAM's head, middle and tail need a train length of at least 3 x edge = {3 * self.edge} tokens, but "
                f"it is {lengths.train}. Raise the train length (--train-length) or lower positions.edge.",
                code="train_length_too_short",
            )

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw: the text runs on."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator, progress: float) -> Window:
        """Draw the lengths of the chunks and where the middle ends."""
        edge = self.edge if rng.random() < 0.5 else lengths.train // 3
        most = lengths.target - lengths.train  # the tail's skip, and the largest of the middle
        skip = int(truncated_gaussian(most + 1, self.spread, rng))
        ids = np.arange(lengths.train, dtype=np.int64)
        sizes = [edge, lengths.train - 2 * edge, edge]
        return Window(token_index=ids, position_ids=ids + np.repeat([0, skip, most], sizes))


def truncated_gaussian(count: int, spread: float, rng: np.random.Generator) -> float:
    """A draw from a Gaussian around `count / 2`, cut off outside of [0, count).

    Args:
        spread: its standard deviation before it is cut off, as a share of `count`.
    """
    gaussian = NormalDist(0.5, spread)
    low, high = gaussian.cdf(0.0), gaussian.cdf(1.0)
    share = gaussian.inv_cdf(low + (high - low) * rng.random())
    return count * min(max(share, 0.0), math.nextafter(1.0, 0.0))
