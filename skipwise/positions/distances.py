"""Formulas of the distances between tokens that a window shows, which samplers put together.

A relative distance d is *seen* in a window when two of its position ids differ by d.
"""

import numpy as np
from numpy.typing import NDArray

from skipwise.lengths import Lengths
from skipwise.positions.window import Distances

Floats = NDArray[np.float64]


def run_distances(length: int, target: int) -> Distances:
    """Distances of `length` tokens in a row: d below it, each shown by `length` - d pairs.

    >>> run_distances(2, 3).pairs
    array([2., 1., 0.])
    """
    distance = np.arange(target)
    return Distances(
        seen=(distance < length).astype(np.float64), pairs=np.maximum(0, length - distance).astype(np.float64)
    )


def two_chunk_distances(cuts: Floats, skips: Floats) -> Distances:
    """Distances of two chunks, whose cut c and skip u are independent.

    Chunks of c and Lw - c tokens, the second shifted by u, show the distances below max(c, Lw - c) inside chunks,
    and u + 1, ..., u + Lw - 1 across the skip:

        P(d) = P(max(c, Lw - c) > d) + P(max(c, Lw - c) <= d) * P(d - Lw < u < d).

    Of the Lw - delta pairs that are delta apart in the window min(c, Lw - c, delta, Lw - delta) lie across the cut, and
    their distance is delta + u: a convolution.

    Args:
        cuts: float64[Lw - 1], probabilities of c = 1, ..., Lw - 1.
        skips: float64[Lt - Lw + 1], probabilities of u = 0, ..., Lt - Lw.

    >>> two_chunk_distances(np.array([1.0]), np.full(3, 1 / 3)).seen
    array([1.        , 0.33333333, 0.33333333, 0.33333333])
    """
    train = len(cuts) + 1
    target = train + len(skips) - 1
    distance, cut = np.arange(target), np.arange(1, train)
    longest = np.bincount(np.maximum(cut, train - cut), cuts, minlength=target + 1)
    inside = 1 - longest.cumsum()[:target]
    # P(u < d) for d = 0, ..., Lt, and of that what is left when u <= d - Lw is taken away.
    below = np.concatenate(([0.0], skips.cumsum(), np.ones(train)))
    crossed = below[distance] - below[np.maximum(0, distance - train + 1)]
    seen: Floats = inside + (1 - inside) * crossed
    seen[0] = 1.0
    across = np.concatenate(([0.0], pairs_across(cuts)))
    pairs = np.convolve(across, skips)[:target]
    pairs[:train] += train - np.arange(train) - across
    return Distances(seen, pairs)


def pairs_across(weights: Floats) -> Floats:
    """sum over c of weights[c] * min(c, Lw - c, delta, Lw - delta), for delta = 1, ..., Lw - 1.

    So many of the pairs of tokens that are delta apart lie across a cut after c tokens. By cut and by distance it is
    the same function, so it also takes weights of distances to sums for each cut.

    Args:
        weights: float64[Lw - 1], of c = 1, ..., Lw - 1.

    >>> pairs_across(np.array([0.0, 1.0, 0.0])).tolist()
    [1.0, 2.0, 1.0]
    """
    train = len(weights) + 1
    nearest = np.minimum(np.arange(1, train), np.arange(train - 1, 0, -1))
    # min(m, n) is the number of j = 1, ..., n with m >= j.
    by_nearest = np.bincount(nearest, weights, minlength=train // 2 + 1)
    at_least = by_nearest[::-1].cumsum()[::-1]
    sums: Floats = np.concatenate(([0.0], at_least[1:].cumsum()))[nearest]
    return sums


def sequential_pairs(chunks: int, lengths: Lengths) -> Floats:
    """float64[Lt]: expected pairs at each distance for PoSE with N chunks, whose skips are drawn one after the other.

    A pair of tokens delta apart in the window has k cuts between its tokens; cuts are N - 1 distinct ones of Lw - 1
    places. Summed over all such pairs, by Vandermonde's identity,

        W_k(delta) = C(delta, k) C(Lw - delta, N - k) / C(Lw - 1, N - 1)

    pairs are expected in any two chunks k apart, and the difference s of those chunks' skips is independent of cuts. So
    the number at d is the sum over k of W_k * Q_k, convolved, with Q_k(s) = sum over a of P(u_{a+k} - u_a = s).
    """
    train, target = lengths.train, lengths.target
    delta = np.arange(train)
    top = _log_choose(train - 1, chunks - 1)
    weights = [np.exp(_log_choose(delta, k) + _log_choose(train - delta, chunks - k) - top) for k in range(chunks)]
    result = chunks * np.pad(weights[0], (0, target - train))
    for weight, differences in zip(weights[1:], _skip_differences(chunks, target - train), strict=True):
        result += np.convolve(weight, differences)[:target]
    return result


def _log_choose(n: int | NDArray[np.int64], k: int) -> Floats:
    """log C(n, k) for each n, -inf where n < k; exact but for rounding, since k is small."""
    n = np.asarray(n)
    steps = np.arange(k)
    factors = np.maximum(0, n[..., None] - steps) / (steps + 1.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(factors).sum(axis=-1))


def _skip_differences(chunks: int, most: int) -> list[Floats]:
    """For k = 1, ..., chunks - 1: Q_k, float64[most + 1], the sum over a of P(u_{a+k} - u_a = s).

    With what remains of the largest skip, r_a = S - u_a, each draw is uniform on {0, ..., r}: the distribution of r_a
    follows by one reversed cumulative sum per draw. k draws lead from r to t = r - s with probability

        h_{k-1}(x_t, ..., x_r) / (r + 1),    x_j = 1 / (j + 1),

    where h is the complete homogeneous symmetric polynomial. Its generating function over t..r is that over 0..r
    divided by that over 0..t-1, which separates r from t, and leaves k correlations over r and t = r - s.
    """
    size = most + 1
    inverse = 1.0 / np.arange(1, size + 1)
    # remaining[a]: the distribution of r_a.
    remaining = [np.eye(1, size, most)[0]]
    for _ in range(chunks - 2):
        remaining.append((remaining[-1] * inverse)[::-1].cumsum()[::-1])
    # Of x_0 .. x_r complete, and of x_0 .. x_{t-1} elementary symmetric polynomials with alternating signs.
    complete, elementary = [np.ones(size)], [np.ones(size)]
    for _ in range(chunks - 2):
        # The highest of the x in a product is x_j: what comes before it is of degree one less.
        complete.append((inverse * complete[-1]).cumsum())
        elementary.append(-np.concatenate(([0.0], (inverse * elementary[-1])[:-1])).cumsum())
    return [
        _correlations(sum(remaining[: chunks - k], np.zeros(size)) * inverse, complete[:k], elementary[:k])
        for k in range(1, chunks)
    ]


def _correlations(start: Floats, complete: list[Floats], elementary: list[Floats]) -> Floats:
    """sum over t of start(t + s) * sum_i complete_i(t + s) elementary_{k-1-i}(t), for each s."""
    size = 2 * len(start)
    spectrum = sum(
        np.fft.rfft(start * one, size) * np.fft.rfft(other, size).conj()
        for one, other in zip(complete, reversed(elementary), strict=True)
    )
    return np.asarray(np.maximum(0.0, np.fft.irfft(spectrum, size)[: len(start)]))
