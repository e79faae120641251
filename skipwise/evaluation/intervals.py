"""95 % intervals."""

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    >>> tuple(round(bound, 4) for bound in wilson(10, 10))
    (0.7225, 1.0)
    """
    share, z2 = successes / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_shares(gained: float, lost: float, pairs: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares (Bonett & Price 2012): never of no width.

    Args:
        gained, lost: pairs that only the second, and only the first, got right; may be fractions.

    >>> tuple(round(bound, 3) for bound in paired_shares(0, 0, 10))
    (-0.231, 0.231)
    """
    up, down, total = (gained + 1) / (pairs + 2), (lost + 1) / (pairs + 2), pairs + 2
    half = Z * math.sqrt((up + down - (up - down) ** 2) / total)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def bootstrap_ratio(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[RESAMPLES]: sum over sum, in samples of units drawn with replacement (Efron 1979).

    The units are documents or prompts. The draws depend on the number of units only, so two models
    measured on the same units are resampled together.
    """
    units = len(numerators)
    counts = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    ratios: NDArray[np.float64] = (counts @ numerators) / (counts @ denominators)
    return ratios


def percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
