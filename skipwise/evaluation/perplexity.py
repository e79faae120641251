"""Perplexity over sliding windows, and of truncated documents."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from skipwise.errors import UserError
from skipwise.evaluation.intervals import Z, ratio_with_error
from skipwise.evaluation.specs import Perplexity
from skipwise.models.forward import log_probabilities

Tokens = NDArray[np.int64]
# Windows are batched up to this many tokens.
BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Slide:
    """One window of a document: its tokens are [begin, end), those from `score_from` on are scored."""

    begin: int
    end: int
    score_from: int


def sliding_windows(num_tokens: int, context_length: int, stride: int, final_tokens: int | None = None) -> list[Slide]:
    """Windows in which every scored token is predicted exactly once, with as much context as fits.

    The first token of a document is context only: nothing stands before it.

    >>> [(w.begin, w.end, w.score_from) for w in sliding_windows(10, context_length=4, stride=3)]
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    """
    stride = min(stride, context_length - 1)
    scored = 1 if final_tokens is None else max(1, num_tokens - final_tokens)
    slides = []
    while scored < num_tokens:
        end = min(num_tokens, max(scored + stride, context_length))
        slides.append(Slide(begin=max(0, end - context_length), end=end, score_from=scored))
        scored = end
    return slides


def choose_documents(
    documents: list[Tokens], context_lengths: tuple[int, ...], count: int
) -> tuple[list[Tokens], list[int]]:
    """The documents to score, and the context lengths they reach.

    Every length is measured on the same documents: those with at least as many tokens as the largest
    length that any document reaches; the longest first, at most `count`.
    """
    longest = max((len(document) for document in documents), default=0)
    reached = [length for length in sorted(context_lengths) if length <= longest]
    if not reached:
        return [], []
    enough = [document for document in documents if len(document) >= reached[-1]]
    return sorted(enough, key=len, reverse=True)[:count], reached


def perplexity_figures(
    model: PreTrainedModel,
    documents: list[Tokens],
    spec: Perplexity,
    context_length: int,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Sliding-window perplexity at one context length; the keys are those of `EvalResult`.

    Args:
        documents: int64[n] each, with the tokenizer's begin-of-text token in front if it has one;
            windows in the middle of a document have none.
        on_step: called after every batch.
    """
    slides: dict[int, list[tuple[int, Slide]]] = {}
    for number, document in enumerate(documents):
        for slide in sliding_windows(len(document), context_length, spec.stride, spec.final_tokens):
            slides.setdefault(slide.end - slide.begin, []).append((number, slide))
    nll, count = np.zeros(len(documents)), np.zeros(len(documents))
    for width, same_width in slides.items():
        for batch in _batches(same_width, max(1, BATCH_TOKENS // width)):
            ids = np.stack([documents[number][slide.begin : slide.end] for number, slide in batch])
            starts = np.array([slide.score_from - slide.begin for _, slide in batch])
            scored = np.arange(width) >= starts[:, None]
            log_probs, _ = log_probabilities(model, torch.from_numpy(ids), torch.from_numpy(scored))
            parts = np.split(log_probs.double().numpy(), np.cumsum(scored.sum(axis=1))[:-1])
            for (number, _), part in zip(batch, parts, strict=True):
                nll[number] -= part.sum()
                count[number] += len(part)
            on_step()
    return _figures(nll, count)


def truncated_perplexity_figures(
    model: PreTrainedModel,
    documents: list[Tokens],
    context_lengths: list[int],
    on_step: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Any]]:
    """Perplexity of the first tokens of documents, at every length from one pass per document.

    Args:
        documents: each at least as long as the largest length.
        context_lengths: ascending.
    """
    nll = {length: np.zeros(len(documents)) for length in context_lengths}
    for number, document in enumerate(documents):
        ids = torch.from_numpy(document[None, : context_lengths[-1]])
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        log_probs, _ = log_probabilities(model, ids, scored)
        sums = np.cumsum(log_probs.double().numpy())
        for length in context_lengths:
            nll[length][number] = -sums[length - 2]
        on_step()
    return {length: _figures(nll[length], np.full(len(documents), length - 1.0)) for length in context_lengths}


def _figures(nll: NDArray[np.float64], count: NDArray[np.float64]) -> dict[str, Any]:
    mean, error = ratio_with_error(nll, count)
    value = finite_exp(mean)
    if value is None:
        raise UserError(f"The mean loss is {mean:.4g} nats per token, which is no perplexity: the model is broken.")
    return {
        "metric": "perplexity",
        "value": value,
        "stderr": None if error is None else value * error,
        "interval_low": None if error is None else finite_exp(mean - Z * error),
        "interval_high": None if error is None else finite_exp(mean + Z * error),
        "num_samples": int(count.sum()),
    }


def finite_exp(value: float) -> float | None:
    """`exp(value)`, or None when that is no finite number."""
    return math.exp(value) if value < 700 else None


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
