"""From examples to results: sums over sums, with 95 % intervals; and what differs between two models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError

# The exponential of a mean loss above this has no finite square, which standard errors need.
MOST_NATS = 340.0
# What was measured on one prompt or document; it becomes one line of a file.
Example = dict[str, Any]
# The keys of `EvalResult` that are not the same for all rows of an evaluation.
Result = dict[str, Any]


def perplexity_results(examples: Sequence[Example]) -> list[Result]:
    """Perplexity, and bits per byte, over all documents together.

    Args:
        examples: each with `nll` (nats, summed), `tokens` (how many were scored) and `bytes` (of their text; 0 where
            that is not known).

    Returns:
        exp(sum of nll / sum of tokens), and sum of nll / (ln 2 * sum of bytes), each with an interval from
        resampling documents; a single document has none.

    Raises:
        UserError: when the loss is not one that a working model has.
    """
    nll = np.array([example["nll"] for example in examples])
    tokens = np.array([example["tokens"] for example in examples], dtype=np.float64)
    size = np.array([example["bytes"] for example in examples], dtype=np.float64)
    mean = float(nll.sum() / tokens.sum())
    if not mean < MOST_NATS:  # NaN included
        raise UserError(
            f"The mean loss is {mean:.4g} nats per token, which is no perplexity: the model is broken.",
            code="loss_too_large",
        )
    count = {"num_samples": int(tokens.sum())}
    results = [{"metric": "perplexity", **_resampled(nll, tokens, _exp), **count}]
    if size.sum():
        bits = _resampled(nll / math.log(2), size, float)
        results.append({"metric": "bits_per_byte", **bits, "num_samples": int(size.sum())})
    return results


def share_result(examples: Sequence[Example], depth: float | None = None) -> Result:
    """Share of right answers, with Wilson's interval; examples have a `score` of 0 or 1 each."""
    hits = sum(int(example["score"]) for example in examples)
    share = hits / len(examples)
    low, high = wilson(hits, len(examples))
    return {
        "metric": "accuracy",
        "depth": depth,
        "value": share,
        "stderr": math.sqrt(share * (1 - share) / len(examples)),
        "interval_low": low,
        "interval_high": high,
        "num_samples": len(examples),
    }


def score_result(metric: str, examples: Sequence[Example]) -> Result:
    """Mean of a `score` in [0, 1], with Wilson's interval.

    For scores between 0 and 1 the interval is wider than need be: nothing with that mean varies more than what is
    either 0 or 1. Resampling would give none at all where all scores are equal.
    """
    scores = np.array([example["score"] for example in examples], dtype=np.float64)
    low, high = wilson(float(scores.sum()), len(scores))
    error = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return {
        "metric": metric,
        "value": float(scores.mean()),
        "stderr": error,
        "interval_low": low,
        "interval_high": high,
        "num_samples": len(scores),
    }


def difference(one: Sequence[Example], other: Sequence[Example]) -> Result | None:
    """How much the result of `other` is above that of `one`, on the examples both have.

    Perplexities are compared where both models cut the text into the same tokens, else bits per byte.

    Returns:
        `metric`, `value`, `interval_low`, `interval_high` and `num_samples` (shared examples); None where fewer
        than two are shared, or where tokens differ and bytes are not known. Intervals of losses come from resampling
        both models together, those of scores are Bonett and Price's.
    """
    mine, theirs = ({(line["context_length"], line["example"]): line for line in side} for side in (one, other))
    pairs = [
        (mine[key], line)
        for key, line in theirs.items()
        if key in mine and mine[key].get("prompt") == line.get("prompt")
    ]
    if len(pairs) < 2:
        return None
    same_tokens = all(a.get("tokens") == b.get("tokens") for a, b in pairs)
    if "score" in pairs[0][0]:
        metric, top, bottom = "score", "score", None
    elif same_tokens:
        metric, top, bottom = "perplexity", "nll", "tokens"
    elif all(a["bytes"] and b["bytes"] for a, b in pairs):
        metric, top, bottom = "bits_per_byte", "nll", "bytes"
    else:
        return None
    transform = _TRANSFORMS[metric]
    sides = []
    for side in zip(*pairs, strict=True):
        numerators = np.array([example[top] for example in side], dtype=np.float64)
        denominators = np.array([example[bottom] if bottom else 1.0 for example in side], dtype=np.float64)
        sides.append((numerators.sum() / denominators.sum(), bootstrap_ratio(numerators, denominators)))
    if top == "score":
        gains = np.array([b["score"] - a["score"] for a, b in pairs])
        low, high = paired_shares(float(gains[gains > 0].sum()), float(-gains[gains < 0].sum()), len(pairs))
    else:
        low, high = percentiles(transform(sides[1][1]) - transform(sides[0][1]))
    value = float(transform(sides[1][0]) - transform(sides[0][0]))
    metric = pairs[0][0].get("metric", metric)
    return {"metric": metric, "value": value, "interval_low": low, "interval_high": high, "num_samples": len(pairs)}


_TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "score": lambda mean: mean,
    "perplexity": np.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}


def _resampled(numerators: NDArray[np.float64], denominators: NDArray[np.float64], transform: Any) -> Result:
    """Value, standard error and interval of `transform(sum / sum)`; a single example has no error."""
    value = transform(float(numerators.sum() / denominators.sum()))
    if len(numerators) < 2:
        return {"value": value, "stderr": None, "interval_low": None, "interval_high": None}
    drawn = np.array([transform(ratio) for ratio in bootstrap_ratio(numerators, denominators)])
    low, high = percentiles(drawn)
    return {"value": value, "stderr": float(drawn.std(ddof=1)), "interval_low": low, "interval_high": high}


def _exp(value: float) -> float:
    """`exp`, finite: a resampled loss may be larger than any that a result is made of."""
    return math.exp(min(value, MOST_NATS))


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
    samples = len(numerators)
    counts = np.random.default_rng(0).multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)
    ratios: NDArray[np.float64] = (counts @ numerators) / (counts @ denominators)
    return ratios


def percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


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
    seeds, samples = sums.shape
    value = float(sums.sum() / (seeds * sizes.sum()))
    parts = []
    if seeds > 1:
        by_seed = sums.sum(axis=1) / sizes.sum()
        parts.append((float(by_seed.var(ddof=1)) / seeds, seeds - 1))
    if samples > 1:
        # Of a ratio, by its derivative: what each document adds to the numerator beyond its share.
        rest = (sums.mean(axis=0) - value * sizes) / sizes.mean()
        parts.append((float(rest.var(ddof=1)) / samples, samples - 1))
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
