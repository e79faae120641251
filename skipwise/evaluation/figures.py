"""From examples to figures: sums over sums, with 95 % intervals; and what differs between two models."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.evaluation.intervals import bootstrap_ratio, paired_shares, percentiles, wilson

# The exponential of a mean loss above this has no finite square, which standard errors need.
MOST_NATS = 340.0
# What was measured on one prompt or document; it becomes one line of a file.
Example = dict[str, Any]
# The keys of `EvalResult` that are not the same for all rows of an evaluation.
Figure = dict[str, Any]


def perplexity_figures(examples: Sequence[Example]) -> list[Figure]:
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
    figures = [{"metric": "perplexity", **_resampled(nll, tokens, _exp), **count}]
    if size.sum():
        bits = _resampled(nll / math.log(2), size, float)
        figures.append({"metric": "bits_per_byte", **bits, "num_samples": int(size.sum())})
    return figures


def share_figure(examples: Sequence[Example], depth: float | None = None) -> Figure:
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


def score_figure(metric: str, examples: Sequence[Example]) -> Figure:
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


def difference(one: Sequence[Example], other: Sequence[Example]) -> Figure | None:
    """How much the figure of `other` is above that of `one`, on the examples both have.

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


def _resampled(numerators: NDArray[np.float64], denominators: NDArray[np.float64], transform: Any) -> Figure:
    """Value, standard error and interval of `transform(sum / sum)`; a single example has no error."""
    value = transform(float(numerators.sum() / denominators.sum()))
    if len(numerators) < 2:
        return {"value": value, "stderr": None, "interval_low": None, "interval_high": None}
    drawn = np.array([transform(ratio) for ratio in bootstrap_ratio(numerators, denominators)])
    low, high = percentiles(drawn)
    return {"value": value, "stderr": float(drawn.std(ddof=1)), "interval_low": low, "interval_high": high}


def _exp(value: float) -> float:
    """`exp`, finite: a resampled loss may be larger than any that a figure is made of."""
    return math.exp(min(value, MOST_NATS))
