"""The samplers PoSE is compared with."""

from typing import Literal

import numpy as np

from skipwise.lengths import Lengths
from skipwise.positions.window import Document, Window
from skipwise.sections import section


@section
class RandPos:
    """Randomised positions (arXiv 2305.16843): a sorted uniform sample of Lw positions out of Lt.

    As in the PoSE paper's comparison the sample is shifted to start at 0, and the text is contiguous.
    """

    name: Literal["randpos"] = "randpos"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator, progress: float) -> Window:
        """Draw Lw distinct positions from {0, ..., Lt - 1}, sort them, subtract the first."""
        ids = np.sort(rng.choice(lengths.target, size=lengths.train, replace=False)).astype(np.int64)
        return Window(token_index=np.arange(lengths.train, dtype=np.int64), position_ids=ids - ids[0])


@section
class Plain:
    """Ordinary windows of Lw tokens without skips: the control that shows what the skips add."""

    name: Literal["plain"] = "plain"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        """Lw."""
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator, progress: float) -> Window:
        """The identity at Lw tokens."""
        return _identity(lengths.train)


@section
class FullLength:
    """Windows of the whole target length: the expensive method PoSE stands in for."""

    name: Literal["full"] = "full"

    def check(self, lengths: Lengths) -> None:
        """Any lengths will do."""

    def tokens_needed(self, lengths: Lengths) -> int:
        """Lt."""
        return lengths.target

    def tokens_used(self, lengths: Lengths) -> int:
        """Lt."""
        return lengths.target

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator, progress: float) -> Window:
        """The identity at Lt tokens."""
        return _identity(lengths.target)


def _identity(length: int) -> Window:
    ids = np.arange(length, dtype=np.int64)
    return Window(token_index=ids, position_ids=ids)
