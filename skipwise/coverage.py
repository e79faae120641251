"""Which relative distances a position sampler shows to a model: exactly where there is a formula, else by sampling.

A relative distance d is *seen* in a window when two of its position ids differ by d. What a model has never seen it
cannot have learned, so a sampler is judged by how likely each d below Lt is seen, by how many pairs of tokens show it,
and by how many windows it takes until none is left out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.positions import Document, FullLength, Matched, Plain, PoSE, PositionSampler, RandPos, example_rng
from skipwise.positions.matched import pairs_across
from skipwise.positions.pose import END_SHARE

Floats = NDArray[np.float64]
# Of a sentence, in a text of which nothing is known.
SENTENCE_TOKENS = 25


def seen_probability(sampler: PositionSampler, lengths: Lengths) -> Floats | None:
    """float64[Lt]: the probability that distance d is seen in one window; None where there is no closed form.

    Two chunks of c and Lw - c tokens, the second shifted by u, show the distances below max(c, Lw - c) inside chunks,
    and u + 1, ..., u + Lw - 1 across the skip. Where cut and skip are independent,

        P(d) = P(max(c, Lw - c) > d) + P(max(c, Lw - c) <= d) * P(d - Lw < u < d).

    >>> seen_probability(PoSE(), Lengths(original=2, train=2, target=4))
    array([1.        , 0.33333333, 0.33333333, 0.33333333])
    """
    distance = np.arange(lengths.target)
    if isinstance(sampler, FullLength):
        return np.ones(lengths.target)
    if isinstance(sampler, Plain) or (isinstance(sampler, PoSE) and sampler.chunks == 1):
        return (distance < lengths.train).astype(np.float64)
    policy = _two_chunks(sampler, lengths)
    if policy is None:
        return None
    cuts, skips = policy
    cut = np.arange(1, lengths.train)
    longest = np.bincount(np.maximum(cut, lengths.train - cut), cuts, minlength=lengths.target + 1)
    inside = 1 - longest.cumsum()[: lengths.target]
    # P(u < d) for d = 0, ..., Lt, and of that what is left when u <= d - Lw is taken away.
    below = np.concatenate(([0.0], skips.cumsum(), np.ones(lengths.train)))
    across = below[distance] - below[np.maximum(0, distance - lengths.train + 1)]
    seen: Floats = inside + (1 - inside) * across
    seen[0] = 1.0
    return seen


def expected_pairs(sampler: PositionSampler, lengths: Lengths) -> Floats | None:
    """float64[Lt]: the expected number of token pairs at distance d in one window; None where there is no formula.

    RandPos takes each pair of positions with probability Lw (Lw - 1) / (Lt (Lt - 1)), and Lt - d pairs have distance d.

    Two chunks, whose cut c and skip u are independent: of the Lw - delta pairs that are delta apart in the window
    min(c, Lw - c, delta, Lw - delta) lie across the cut, and their distance is delta + u: a convolution.

    PoSE with N chunks: a pair of tokens delta apart in the window has k cuts between its tokens; cuts are N - 1
    distinct ones of Lw - 1 places. Summed over all such pairs, by Vandermonde's identity,

        W_k(delta) = C(delta, k) C(Lw - delta, N - k) / C(Lw - 1, N - 1)

    pairs are expected in any two chunks k apart, and the difference s of those chunks' skips is independent of cuts. So
    the number at d is the sum over k of W_k * Q_k, convolved, with Q_k(s) = sum over a of P(u_{a+k} - u_a = s).
    """
    train, target = lengths.train, lengths.target
    distance = np.arange(target)
    if isinstance(sampler, FullLength):
        return (target - distance).astype(np.float64)
    if isinstance(sampler, Plain):
        return np.maximum(0, train - distance).astype(np.float64)
    if isinstance(sampler, RandPos):
        pairs = (target - distance) * (train * (train - 1) / max(1, target * (target - 1)))
        return np.where(distance == 0, float(train), pairs)
    policy = _two_chunks(sampler, lengths)
    if policy is not None:
        return _pairs_of_two(*policy, target)
    if not isinstance(sampler, PoSE) or sampler.skips != "sequential":
        return None
    chunks = sampler.chunks
    delta = np.arange(train)
    top = _log_choose(train - 1, chunks - 1)
    weights = [np.exp(_log_choose(delta, k) + _log_choose(train - delta, chunks - k) - top) for k in range(chunks)]
    result = chunks * np.pad(weights[0], (0, target - train))
    for weight, differences in zip(weights[1:], _skip_differences(chunks, target - train), strict=True):
        result += np.convolve(weight, differences)[:target]
    return result


def _two_chunks(sampler: PositionSampler, lengths: Lengths) -> tuple[Floats, Floats] | None:
    """Probabilities of the cuts 1, ..., Lw - 1 and of the skips 0, ..., Lt - Lw of a sampler with two chunks."""
    if isinstance(sampler, Matched):
        return sampler.policy(lengths)
    if not isinstance(sampler, PoSE) or sampler.chunks != 2:
        return None
    last = (lengths.train + 1) // 2 if sampler.first_chunk == "half" else lengths.train - 1
    cuts = np.where(np.arange(1, lengths.train) <= last, 1 / last, 0.0)
    skips = np.full(lengths.target - lengths.train + 1, 1 / (lengths.target - lengths.train + 1))
    if sampler.skips == "ends":
        skips *= 1 - 2 * END_SHARE
        skips[0] += END_SHARE
        skips[-1] += END_SHARE
    return cuts, skips


def _pairs_of_two(cuts: Floats, skips: Floats, target: int) -> Floats:
    """float64[Lt]: expected pairs of two chunks."""
    train = len(cuts) + 1
    across = np.concatenate(([0.0], pairs_across(cuts)))
    result = np.convolve(across, skips)[:target]
    result[:train] += train - np.arange(train) - across
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
    seen, pairs = seen_probability(sampler, lengths), expected_pairs(sampler, lengths)
    sampled = sample_coverage(sampler, lengths, windows, seed) if seen is None or pairs is None else None
    exact = seen is not None, pairs is not None
    if sampled is not None:
        seen = sampled.seen if seen is None else seen
        pairs = sampled.pairs if pairs is None else pairs
    assert seen is not None and pairs is not None
    return Coverage(seen, pairs, windows_to_cover(seen), *exact)


def describe_coverages(found: Mapping[str, Coverage]) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table, a column for each sampler.

    Pairs are counted by quarters of the target: what share of a window's pairs is how far apart.
    """
    rows = [["seen, the rarest distance", *(_mark(one.seen_exact, f"{one.seen.min():.2g}") for one in found.values())]]
    for quarter in range(4):
        name = f"pairs, {('first', 'second', 'third', 'last')[quarter]} quarter of distances"
        shares = [np.array_split(one.pairs, 4)[quarter].sum() / one.pairs.sum() for one in found.values()]
        rows.append(
            [name, *(_mark(one.pairs_exact, f"{share:.1%}") for one, share in zip(found.values(), shares, strict=True))]
        )
    cover = [
        f"{one.windows_to_cover:,}" if one.windows_to_cover else "never" if one.seen_exact else "more than drawn"
        for one in found.values()
    ]
    seen = [_mark(one.seen_exact, text) for one, text in zip(found.values(), cover, strict=True)]
    rows.append(["windows until all are seen, 99 %", *seen])
    return ["", *found], rows


def _mark(exact: bool, text: str) -> str:
    return text if exact else f"~{text}"


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
        window = sampler.sample(document, lengths, rng, index / windows)
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
