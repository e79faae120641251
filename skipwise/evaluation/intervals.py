"""Standard errors and 95 % intervals."""

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    >>> tuple(round(bound, 4) for bound in wilson(10, 10))
    (0.7225, 1.0)
    """
    share, z2 = successes / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio_with_error(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> tuple[float, float | None]:
    """Sum over sum, and its standard error with documents as the units that vary.

    The linearised variance of a ratio estimator (Cochran 1977, Section 6.3), over float64[n] sums per
    document; None for a single document.
    """
    ratio = float(numerators.sum() / denominators.sum())
    n = len(numerators)
    if n < 2:
        return ratio, None
    residuals = numerators - ratio * denominators
    return ratio, float(math.sqrt((residuals**2).sum() * n / (n - 1)) / denominators.sum())
