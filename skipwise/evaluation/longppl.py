"""LongPPL: perplexity of the tokens that a long context is needed for (arXiv 2410.23771)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.config import ModelConfig
from skipwise.data.held_out import HeldOutDocument
from skipwise.digests import short_digest
from skipwise.errors import UserError
from skipwise.evaluation.figures import Example, Figure, perplexity_figures
from skipwise.evaluation.perplexity import chosen, described, sliding_log_probs, truncated_sums
from skipwise.evaluation.prompts import decode
from skipwise.evaluation.slides import sliding_windows
from skipwise.evaluation.specs import LongPPL
from skipwise.evaluation.unit import Key, Setting, Subject, Unit
from skipwise.models.load import load_model, load_tokenizer
from skipwise.models.reading import score_tokens
from skipwise.models.rope import read_window

Tokens = NDArray[np.int64]
# Key tokens as pieces of the text, so that models with other tokenizers can find them.
Spans = list[list[int]]


@dataclass(frozen=True)
class TextTokens:
    """A text as one tokenizer sees it.

    Attributes:
        ids: int64[n], with its begin-of-text token in front if it has one.
        spans: int64[n, 2], the characters of each token; empty for special ones.
    """

    ids: Tokens
    spans: NDArray[np.int64]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> TextTokens:
    """Tokens with the characters they stand for.

    Raises:
        UserError: when the tokenizer cannot tell.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "longppl needs a tokenizer that knows the characters of its tokens (a fast one), but this one does not. "
            "Leave longppl out.",
            code="fast_tokenizer_needed",
        )
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, spans = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]).reshape(-1, 2)
    if len(ids) and ids[-1] == tokenizer.eos_token_id:
        ids, spans = ids[:-1], spans[:-1]
    return TextTokens(ids, spans)


def key_tokens(long: NDArray[np.float64], short: NDArray[np.float64], alpha: float, beta: float) -> NDArray[np.bool_]:
    """bool[m]: which tokens need the long context (Equations 3-5).

    Args:
        long, short: float64[m], log-likelihoods with the long and with the short context, in nats.

    >>> key_tokens(np.array([-0.5, -0.5, -4.0]), np.array([-5.0, -1.0, -9.0]), alpha=2.0, beta=-2.0).tolist()
    [True, False, False]
    """
    keys: NDArray[np.bool_] = (long - short > alpha) & (long > beta)
    return keys


def choose_key_spans(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, spec: LongPPL, length: int
) -> tuple[int, Spans]:
    """What an evaluator finds in the beginning of a text.

    Returns:
        `(end, spans)`: characters of the first `length` tokens, and the pieces of them that are key tokens;
        `(0, [])` for a text with fewer tokens.
    """
    tokens = tokens_of(tokenizer, text)
    if len(tokens.ids) < length:
        return 0, []
    ids = tokens.ids[:length]
    long = np.diff(truncated_sums(model, ids), prepend=0.0)
    slides = sliding_windows(length, spec.short_context + spec.stride, spec.stride)
    short = sliding_log_probs(model, ids, slides)
    keys = key_tokens(long, short, spec.alpha, spec.beta)
    return int(tokens.spans[length - 1, 1]), tokens.spans[1:length][keys].tolist()


def within(spans: NDArray[np.int64], keys: Spans) -> NDArray[np.bool_]:
    """bool[n]: which tokens share a character with a key token; tokens and keys are in the order of the text."""
    if not keys:
        return np.zeros(len(spans), dtype=bool)
    starts, ends = np.array(keys).T
    following = np.searchsorted(ends, spans[:, 0], side="right")  # the first key that ends after the token begins
    inside = following < len(keys)
    touched: NDArray[np.bool_] = inside & (starts[np.minimum(following, len(keys) - 1)] < spans[:, 1])
    return touched


def longppl_units(subject: Subject, spec: LongPPL, setting: Setting) -> Iterator[Unit]:
    """A unit per context length; an example is a document."""
    documents, reached = chosen(spec, setting)
    for length in reached:
        yield Unit(
            name=spec.name,
            context_lengths=(length,),
            data=f"{described(setting.held_out, documents)}; key tokens by {spec.evaluator}",
            metric="perplexity",
            size=len(documents),
            measure=partial(_measure, subject, spec, setting, documents, length),
            figures=longppl_figures,
        )


def _measure(
    subject: Subject,
    spec: LongPPL,
    setting: Setting,
    documents: list[HeldOutDocument],
    length: int,
    done: set[Key],
    lengths: Sequence[int | None],
) -> Iterator[Example]:
    known = {document.id: document for document in setting.held_out.documents}
    for line in _key_lines(subject, spec, setting, documents, length):
        if (length, line["document"]) in done or not line["keys"]:
            continue
        text = _text(subject, known[line["document"]])
        if short_digest(text[: line["end"]]) != line["text"]:
            raise UserError(
                f"longppl compares models on the same text, but document {line['document']} reads differently with the "
                "tokenizer of this model. Compare models that keep the text as it is.",
                code="tokenizer_changes_text",
            )
        tokens = tokens_of(subject.tokenizer, text[: line["end"]])
        scored = within(tokens.spans, line["keys"])
        scored[0] = False
        scores = score_tokens(subject.model, torch.from_numpy(tokens.ids)[None], torch.from_numpy(scored)[None])
        yield {
            "context_length": length,
            "example": line["document"],
            "prompt": line["text"],
            "nll": -float(scores.log_probs.double().sum()),
            "tokens": int(scored.sum()),
            # Tokens that only touch a key token count in the loss, and their other bytes are none of its own.
            "bytes": 0,
        }


def _key_lines(
    subject: Subject, spec: LongPPL, setting: Setting, documents: list[HeldOutDocument], length: int
) -> Sequence[Example]:
    """The key tokens of every document, chosen by the evaluator where no model before has needed them."""
    name = f"longppl-{length}"
    lines = setting.shared.read(name)
    if lines is not None:
        return lines
    found: list[Example] = []
    config = ModelConfig(path=spec.evaluator)
    tokenizer = load_tokenizer(config)
    evaluator = load_model(config, subject.model.device, subject.dtype)
    window = read_window(evaluator.config)
    if window is not None and length > window:
        raise UserError(
            f"The evaluator of longppl must be able to read the context, but {length:,} tokens are more than the "
            f"{window:,} of {spec.evaluator}. Name an evaluator with a longer window, or lower context_lengths.",
            code="evaluator_window_too_short",
        )
    for number, document in enumerate(documents):
        setting.say(
            f"longppl: {spec.evaluator} chooses key tokens", detail=f", document {number + 1} of {len(documents)}"
        )
        text = _text(subject, document)
        end, keys = choose_key_spans(evaluator, tokenizer, text, spec, length)
        if end:
            found.append({"document": document.id, "end": end, "text": short_digest(text[:end]), "keys": keys})
    if not found:
        raise UserError(
            f"longppl at {length:,} tokens needs a document that long for the tokenizer of {spec.evaluator}.",
            code="documents_too_short",
        )
    setting.shared.write(name, found)
    return found


def _text(subject: Subject, document: HeldOutDocument) -> str:
    return decode(subject.tokenizer, document.read().tolist())


def longppl_figures(examples: Sequence[Example]) -> list[Figure]:
    """As for perplexity, over key tokens; no bits per byte."""
    if not examples:
        raise UserError(
            "the evaluator found no token that needs the long context. Use longer or other documents.",
            code="no_key_tokens",
        )
    return perplexity_figures(examples)
