"""Means over seeds and documents, and what of a difference is chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mean:
    """A mean with its uncertainty.

    Attributes:
        value: it.
        stderr: its standard error; None where nothing varies that could be resampled.
        degrees: of freedom of the t distribution that goes with it.
    """

    value: float
    stderr: float | None
    degrees: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        if self.stderr is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, self.degrees)) * self.stderr
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float | None:
        """Two-sided, that the true mean is 0."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        from scipy.stats import t

        return float(2 * t.sf(abs(self.value) / self.stderr, self.degrees))


def crossed_mean(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> Mean:
    """Sum over sum, where both seeds and documents are samples of what could have been.

    With S seeds and n documents, crossed, the variance is that of the seeds' means over S plus that of the documents'
    over n; what is left in single cells counts in both, so it errs on the safe side (Owen, Annals of Applied Statistics
    2007). With one seed, or one document, only the other part is known. Degrees of freedom are those of the smaller of
    the parts that are known.

    Args:
        sums: float64[S, n], what each seed's model got on each document, e.g. nats.
        sizes: float64[n], what that is to be divided by, e.g. scored tokens.

    >>> mean = crossed_mean(np.array([[1.0, 3.0], [2.0, 6.0]]), np.array([1.0, 1.0]))
    >>> mean.value, round(mean.stderr, 4), mean.degrees
    (3.0, 1.8028, 1)
    """
    seeds, units = sums.shape
    value = float(sums.sum() / (seeds * sizes.sum()))
    parts = []
    if seeds > 1:
        by_seed = sums.sum(axis=1) / sizes.sum()
        parts.append((float(by_seed.var(ddof=1)) / seeds, seeds - 1))
    if units > 1:
        # Of a ratio, by its derivative: what each document adds to the numerator beyond its share.
        rest = (sums.mean(axis=0) - value * sizes) / sizes.mean()
        parts.append((float(rest.var(ddof=1)) / units, units - 1))
    if not parts:
        return Mean(value, None, 0)
    return Mean(value, math.sqrt(sum(variance for variance, _ in parts)), min(degrees for _, degrees in parts))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): below 0.05 where the family still is at 5 %.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
