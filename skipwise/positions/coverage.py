"""Which relative distances a position sampler shows to a model: exactly where there is a formula, else by sampling.

A relative distance d is *seen* in a window when two of its position ids differ by d. What a model has never seen it
cannot have learned, so a sampler is judged by how likely each d below Lt is seen, by how many pairs of tokens show it,
and by how many windows it takes until none is left out.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions.window import Document, PositionSampler, example_rng

Floats = NDArray[np.float64]
# Of a sentence, in a text of which nothing is known.
SENTENCE_TOKENS = 25


@dataclass(frozen=True)
class Coverage:
    """A sampler's, by formulas where there are any, else as sampled.

    Attributes:
        seen: float64[Lt], probability of each distance in one window.
        pairs: float64[Lt], expected number of pairs.
        windows_to_cover: see the function; None where a distance is never seen, or was in no sampled window.
        seen_exact, pairs_exact: whether they come from a formula.
    """

    seen: Floats
    pairs: Floats
    windows_to_cover: int | None
    seen_exact: bool
    pairs_exact: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "seen": self.seen.tolist(), "pairs": self.pairs.tolist()}


def coverage(sampler: PositionSampler, lengths: Lengths, windows: int, seed: int = 0) -> Coverage:
    """Of one sampler; `windows` are drawn only for what has no formula."""
    sampler.check(lengths)
    formulas = sampler.distances(lengths)
    seen, pairs = formulas.seen, formulas.pairs
    sampled = sample_coverage(sampler, lengths, windows, seed) if seen is None or pairs is None else None
    exact = seen is not None, pairs is not None
    if sampled is not None:
        seen = sampled.seen if seen is None else seen
        pairs = sampled.pairs if pairs is None else pairs
    assert seen is not None and pairs is not None
    return Coverage(seen, pairs, windows_to_cover(seen), *exact)


@dataclass(frozen=True)
class Sampled:
    """What some windows showed, by distance.

    Attributes:
        seen: float64[Lt], the share of windows with at least one pair at that distance.
        pairs: float64[Lt], the mean number of pairs.
        pairs_stderr: float64[Lt], its standard error.
        windows: how many there were.
    """

    seen: Floats
    pairs: Floats
    pairs_stderr: Floats
    windows: int


def sample_coverage(sampler: PositionSampler, lengths: Lengths, windows: int, seed: int = 0) -> Sampled:
    """Draw windows and count; any sampler. All distances of a window come from one autocorrelation of its positions.

    Samplers that look at sentences see a text in which each token begins one with probability 1 / `SENTENCE_TOKENS`.
    """
    if windows < 1:
        raise UserError(
            f"Coverage is sampled over at least one window, not {windows}. Raise --windows.", code="count_below_one"
        )
    tokens = max(sampler.tokens_used(lengths), sampler.tokens_needed(lengths))
    size = 2 * lengths.target
    seen, total, squares = (np.zeros(lengths.target) for _ in range(3))
    for index in range(windows):
        rng = example_rng(seed, 0, index)
        document = Document(tokens, np.flatnonzero(rng.random(tokens) < 1 / SENTENCE_TOKENS))
        window = sampler.sample(document, lengths, rng)
        there = np.zeros(size)
        there[window.position_ids] = 1.0
        spectrum = np.fft.rfft(there)
        pairs = np.rint(np.fft.irfft(spectrum * spectrum.conj(), size)[: lengths.target])
        seen += pairs > 0
        total += pairs
        squares += pairs**2
    mean = total / windows
    variance = np.maximum(0.0, squares / windows - mean**2)
    return Sampled(seen / windows, mean, np.sqrt(variance / windows), windows)


def windows_to_cover(seen: Floats, confidence: float = 0.99) -> int | None:
    """After how many windows every distance was seen with at least this probability; None if one never is.

    By the union bound: the smallest n with sum over d of (1 - P(d))^n <= 1 - confidence. Distances need not be
    independent for it, and it is close to the truth where few are rare.

    >>> windows_to_cover(np.array([1.0, 0.5]))
    7
    """
    missed = 1 - seen
    if (missed >= 1).any():
        return None
    few, many = 0, 1
    while (missed**many).sum() > 1 - confidence:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if (missed**middle).sum() <= 1 - confidence else (middle, many)
    return many
