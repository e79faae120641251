"""The samplers PoSE is compared with."""

from typing import ClassVar, Literal

import numpy as np

from skipwise.lengths import Lengths
from skipwise.positions.distances import run_distances
from skipwise.positions.window import Distances, Document, Window
from skipwise.utils.sections import section


@section
class RandPos:
    """Randomised positions (arXiv 2305.16843): a sorted uniform sample of Lw positions out of Lt.

    As in the PoSE paper's comparison the sample is shifted to start at 0, and the text is contiguous.
    """

    has_skips: ClassVar[bool] = True
    needs_sentences: ClassVar[bool] = False
    name: Literal["randpos"] = "randpos"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw Lw distinct positions from {0, ..., Lt - 1}, sort them, subtract the first."""
        ids = np.sort(rng.choice(lengths.target, size=lengths.train, replace=False)).astype(np.int64)
        return Window(token_index=np.arange(lengths.train, dtype=np.int64), position_ids=ids - ids[0])

    def contiguous(self) -> "RandPos":
        """Itself: the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """Lt - d pairs of positions, each drawn with probability Lw (Lw - 1) / (Lt (Lt - 1))."""
        train, target = lengths.train, lengths.target
        distance = np.arange(target)
        pairs = (target - distance) * (train * (train - 1) / max(1, target * (target - 1)))
        return Distances(pairs=np.where(distance == 0, float(train), pairs))


@section
class Plain:
    """Ordinary windows of Lw tokens without skips: the control that shows what the skips add."""

    has_skips: ClassVar[bool] = False
    needs_sentences: ClassVar[bool] = False
    name: Literal["plain"] = "plain"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def window_length(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """The identity at Lw tokens."""
        return _identity(lengths.train)

    def contiguous(self) -> "Plain":
        """Itself: the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """Those of one run of Lw tokens."""
        return run_distances(lengths.train, lengths.target)


@section
class FullLength:
    """Windows of the whole target length: the expensive method PoSE stands in for."""

    has_skips: ClassVar[bool] = False
    needs_sentences: ClassVar[bool] = False
    name: Literal["full"] = "full"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def window_length(self, lengths: Lengths) -> int:
        """Lt."""
        return lengths.target

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lt."""
        return lengths.target

    def tokens_used(self, lengths: Lengths) -> int:
        """Lt."""
        return lengths.target

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """The identity at Lt tokens."""
        return _identity(lengths.target)

    def contiguous(self) -> "FullLength":
        """Itself: the text runs on."""
        return self

    def distances(self, lengths: Lengths) -> Distances:
        """Those of one run of Lt tokens."""
        return run_distances(lengths.target, lengths.target)


def _identity(length: int) -> Window:
    ids = np.arange(length, dtype=np.int64)
    return Window(token_index=ids, position_ids=ids)
