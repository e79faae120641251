"""Evolution of rescaling factors, one per pair of dimensions (after LongRoPE, arXiv 2402.13753, Section 3.2)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Factors = tuple[float, ...]
# Of a population, those that have offspring; by what a factor is changed (standard deviation of its logarithm).
PARENTS = 4
STEP = 0.25


@dataclass(frozen=True)
class Generation:
    """What is known after some generations.

    Attributes:
        number: how many there were; 0 for the start.
        best: the fittest factors so far.
        loss: theirs.
        tried: how many were tried so far.
    """

    number: int
    best: Factors
    loss: float
    tried: int


def evolve_factors(
    start: Sequence[Factors],
    loss_of: Callable[[Factors], float],
    rng: np.random.Generator,
    *,
    generations: int,
    population: int,
    most: float,
) -> Iterator[Generation]:
    """Look for factors with a lower loss.

    In every generation the `PARENTS` best so far are changed: a run of neighbouring dimensions is stretched by one
    random factor, which is what a shift of a ramp's end, or of its height, looks like. Factors stay between 1 and
    `most` and never fall from fast dimensions to slow ones (LongRoPE's monotonicity).

    Args:
        start: to begin with, at least one; e.g. YaRN's ramp.
        loss_of: what is to be low; called once for each candidate.
        rng: the only source of randomness.
        generations: after the start.
        population: new candidates of a generation.
        most: largest factor.

    Yields:
        After the start and after each generation the best so far.
    """
    known = {factors: loss_of(factors) for factors in start}
    for number in range(generations + 1):
        parents = sorted(known, key=lambda factors: known[factors])[:PARENTS]
        yield Generation(number, parents[0], known[parents[0]], len(known))
        if number == generations:
            return
        for child in range(population):
            factors = _changed(parents[child % len(parents)], rng, most)
            if factors not in known:
                known[factors] = loss_of(factors)


def _changed(factors: Factors, rng: np.random.Generator, most: float) -> Factors:
    """A neighbour: one run of dimensions times one factor, made to rise again."""
    logs: NDArray[np.float64] = np.log(np.asarray(factors))
    begin, end = np.sort(rng.choice(len(logs) + 1, size=2, replace=False))
    logs[begin:end] += rng.normal(0.0, STEP)
    logs = np.maximum.accumulate(np.clip(logs, 0.0, np.log(most)))
    return rounded(np.exp(logs))


def rounded(factors: NDArray[np.float64]) -> Factors:
    """Six digits, so that a file gives them back."""
    return tuple(float(f"{factor:.6g}") for factor in factors)
