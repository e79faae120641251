"""CREAM: a middle chunk that moves between a head and a tail (arXiv 2406.07138)."""

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions.window import Distances, Document, Window
from skipwise.utils.sections import section

# Standard deviation of the Gaussian in the authors' code, in half windows.
_SIGMA = 3.0
# Points at which their code knows its distribution.
_POINTS = 1000


@section
class CREAM:
    """Head at the beginning of the target, tail at its end, and the middle somewhere between.

    The head keeps positions `0, ..., h - 1`, and the tail has the last ones, `Lt - h, ..., Lt - 1`. In half of the
    windows head and tail are short, so that most of the window runs on as in pretraining (continuity); in the other
    half all three have the same length, so that more distances are met (relativity).

    As in the authors' code, with f = Lt / Lw: short edges have 4 f tokens; a number of half windows r in {2, ..., 2 f}
    is drawn from a Gaussian around 1 + f with a standard deviation of 3 (what lies outside falls on the ends), and the
    middle ends uniformly between `h + (m - 1) r / 2` and `Lw r / 2 - h - 1`, where m is its length. So it lies below
    the centre on average (0.3 to 0.43 of the range). The text is that at its positions where the document is long
    enough; else the middle's stands before the tail's, which is the end of the document.

    Two things differ: the authors draw r, f and the edges once for a batch of 3,000 documents, here they are drawn for
    every window; and a middle whose text would run into the tail's is taken from before it, not twice.

    With `spread` it is another distribution, ours: the middle ends at a position drawn for every example from a
    Gaussian around the centre of the range, cut off where the middle would touch head or tail and normalised, and the
    text runs on.

    Attributes:
        edge: tokens of head and tail where they are short; None for 4 Lt / Lw.
        spread: standard deviation of our Gaussian, as a share of the range that the end of the middle can lie in; None
            for the distribution of the authors.
    """

    has_skips: ClassVar[bool] = True
    needs_sentences: ClassVar[bool] = False
    name: Literal["cream"] = "cream"
    edge: int | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        if (self.edge is not None and self.edge < 1) or (self.spread is not None and not self.spread > 0):
            raise UserError(
                f"CREAM needs an edge of at least 1 token and a spread above 0, not {self.edge} and {self.spread}. "
                "Leave them out for those of the paper.",
                code="cream_parameters_out_of_range",
            )

    def _short_edge(self, lengths: Lengths) -> int:
        return int(4 * lengths.target / lengths.train) if self.edge is None else self.edge

    def check(self, lengths: Lengths) -> None:
        """Raise `UserError` when the window has no room for a middle."""
        edge = self._short_edge(lengths)
        if lengths.train < 3 * edge:
            raise UserError(
                f"CREAM's head, middle and tail need a train length of at least 3 x edge = {3 * edge} tokens, but "
                f"it is {lengths.train}. Raise the train length (--train-length) or lower positions.edge.",
                code="train_length_too_short",
            )

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lt, whose text stands at its positions; with `spread` Lw, since the text runs on."""
        return lengths.train if self.spread is not None else lengths.target

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw the lengths of the chunks and where the middle ends."""
        edge = self._short_edge(lengths) if rng.random() < 0.5 else lengths.train // 3
        middle = lengths.train - 2 * edge
        if self.spread is not None:
            ids = np.arange(lengths.train, dtype=np.int64)
            most = lengths.target - lengths.train  # the tail's skip, and the largest of the middle
            skip = int(truncated_gaussian(most + 1, self.spread, rng))
            return Window(token_index=ids, position_ids=ids + np.repeat([0, skip, most], [edge, middle, edge]))
        end = _published_end(edge, middle, lengths, rng)
        tokens = document.num_tokens
        at = end + 1 if end < tokens - edge else tokens - edge
        text = _three(edge, middle, at, tokens)
        return Window(token_index=text, position_ids=_three(edge, middle, end + 1, lengths.target))

    def contiguous(self) -> "CREAM":
        """Itself: in a document of one window the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """None: the distribution has no simple form."""
        return Distances()


def _three(edge: int, middle: int, middle_stop: int, stop: int) -> NDArray[np.int64]:
    """int64[2 edge + middle]: the first `edge` numbers, the `middle` before one stop, and the last `edge` before
    another.
    """
    parts = (np.arange(edge), np.arange(middle_stop - middle, middle_stop), np.arange(stop - edge, stop))
    return np.concatenate(parts).astype(np.int64)


def _published_end(edge: int, middle: int, lengths: Lengths, rng: np.random.Generator) -> int:
    """The last position of the middle, as the authors' code draws it (src/train.py of their release)."""
    factor = lengths.target / lengths.train
    grid = np.linspace(2, 2 * factor, _POINTS)
    gaussian = NormalDist(1 + factor, _SIGMA)
    halves = int(np.interp(rng.random(), [gaussian.cdf(x) for x in grid], grid))
    low = int(edge + (middle - 1) * halves / 2)
    high = min(int(halves * lengths.train / 2), lengths.target) - edge - 1
    return int(rng.integers(low, max(low, high), endpoint=True))


def truncated_gaussian(count: int, spread: float, rng: np.random.Generator) -> float:
    """A draw from a Gaussian around `count / 2`, cut off outside of [0, count).

    Args:
        spread: its standard deviation before it is cut off, as a share of `count`.
    """
    gaussian = NormalDist(0.5, spread)
    low, high = gaussian.cdf(0.0), gaussian.cdf(1.0)
    share = gaussian.inv_cdf(low + (high - low) * rng.random())
    return count * min(max(share, 0.0), math.nextafter(1.0, 0.0))
