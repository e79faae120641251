"""What a position sampler draws from, and what it draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from skipwise.lengths import Lengths


@dataclass(frozen=True)
class Document:
    """The text a window is drawn from.

    Attributes:
        num_tokens: Lx, its length in tokens.
        boundaries: indices of tokens that begin a sentence, ascending; empty when unknown.
    """

    num_tokens: int
    boundaries: Sequence[int] | NDArray[np.int64] = ()


@dataclass(frozen=True)
class Window:
    """One training example: which tokens, and at which positions.

    Attributes:
        token_index: int64[n], strictly increasing indices into the document.
        position_ids: int64[n], strictly increasing, starting at 0, below the target length.
    """

    token_index: NDArray[np.int64]
    position_ids: NDArray[np.int64]


class PositionSampler(Protocol):
    """Draws the position ids (and the tokens that carry them) of one training window."""

    @property
    def name(self) -> str:
        """What it is called in a configuration."""
        ...

    @property
    def has_skips(self) -> bool:
        """Whether positions of a window may have gaps."""
        ...

    @property
    def needs_sentences(self) -> bool:
        """Whether a window depends on where sentences begin."""
        ...

    def check(self, lengths: Lengths) -> None:
        """Raise `UserError` when the sampler cannot work with these lengths."""
        ...

    def window_length(self, lengths: Lengths) -> int:
        """Tokens in one window."""
        ...

    def tokens_needed(self, lengths: Lengths) -> int:
        """The shortest document, in tokens, that a window can be drawn from."""
        ...

    def tokens_used(self, lengths: Lengths) -> int:
        """The longest document, in tokens, that a window makes use of. Longer ones are cut to pieces of this."""
        ...

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        """Draw one window.

        Args:
            document: the text, at least `tokens_needed(lengths)` tokens long.
            lengths: original, train and target length.
            rng: the only source of randomness.
        """
        ...

    def contiguous(self) -> "PositionSampler":
        """The sampler of the same positions for a document that is one window long, of which nothing is left out."""
        ...

    def distances(self, lengths: Lengths) -> "Distances":
        """Formulas of the distances that a window shows; `Distances()` where there are none."""
        ...


@dataclass(frozen=True)
class Distances:
    """Formulas of the distances that one window of a sampler shows; None where there is no formula.

    Attributes:
        seen: float64[Lt], the probability that two tokens of the window are at distance d.
        pairs: float64[Lt], the expected number of pairs of tokens at distance d.
    """

    seen: NDArray[np.float64] | None = None
    pairs: NDArray[np.float64] | None = None


def example_rng(seed: int, epoch: int, index: int, source: int = 0) -> np.random.Generator:
    """The random stream of one visit to one example.

    It depends on nothing else, so the same visit gives the same window in any worker, on any rank and
    after a resume, while every new visit draws a new one.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index, source)))
