"""LongPPL: perplexity of the tokens that a long context is needed for (arXiv 2410.23771)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.perplexity import chosen, described, sliding_log_probs, truncated_sums
from skipwise.evaluation.prompts import decode
from skipwise.evaluation.settings import ContextLengths, DocumentIds, Traits, check_at_least_one, check_lengths
from skipwise.evaluation.sliding_windows import sliding_windows
from skipwise.evaluation.statistics import Example, Result, perplexity_results
from skipwise.models.config import ModelConfig
from skipwise.utils.files import short_hash
from skipwise.utils.sections import section
from skipwise.utils.settings import Length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skipwise.data.held_out import HeldOutDocument

Tokens = NDArray[np.int64]
# Key tokens as pieces of the text, so that models with other tokenizers can find them.
Spans = list[list[int]]


@section
class LongPPL:
    """Perplexity of the tokens that need a long context (LongPPL, Fang et al., arXiv 2410.23771).

    A token is a key token if the evaluator model finds it much likelier with the long context than with the
    last `short_context` tokens only (log-ratio above `alpha`, Equation 3), and likely in itself (log-likelihood
    with the long context above `beta`). Key tokens are chosen once, stored, and the same for all models.

    Attributes:
        context_lengths: documents are cut to this many tokens of the evaluator, which must fit into its window.
        evaluator: the model that chooses: directory, hub id or `.gguf` file.
        short_context: K, tokens of the short context at least.
        stride: tokens by which the short contexts move; they have up to `short_context + stride` tokens.
        alpha: least gain in log-likelihood (nats) that the long context must bring.
        beta: least log-likelihood (nats) with the long context.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens, document_ids: as for `perplexity`.
    """

    traits: ClassVar[Traits] = Traits(
        metric="perplexity",
        counted="documents",
        on_documents=True,
        other_model="evaluator",
        without_effect=frozenset({"min_document_tokens"}),
    )
    name: Literal["longppl"] = "longppl"
    context_lengths: ContextLengths
    evaluator: str
    short_context: Length = 4096
    stride: int = 1024
    alpha: float = 2.0
    beta: float = -2.0
    documents: int = 10
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None

    def __post_init__(self) -> None:
        check_lengths(self.context_lengths)
        check_at_least_one(stride=self.stride, documents=self.documents)
        if self.short_context >= min(self.context_lengths):
            raise UserError(
                f"short_context must be below the context lengths, but {self.short_context:,} >= "
                f"{min(self.context_lengths):,}. Lower it, for example to {max(1, min(self.context_lengths) // 4):,}.",
                code="short_context_too_long",
            )

    def texts_read(self) -> None:
        """Not known: the evaluator's reading depends on what was chosen before."""
        return

    def with_documents(self, ids: tuple[str, ...], lengths: tuple[int, ...]) -> LongPPL:
        """With these documents, which reach these lengths."""
        return replace(self, context_lengths=lengths, document_ids=ids)

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is a document."""
        documents, reached = chosen(self, context)
        for length in reached:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data=f"{described(context.held_out, documents)}; key tokens by {self.evaluator}",
                metric=self.traits.metric,
                size=len(documents),
                measure=partial(_measure, tested, self, context, documents, length),
                results=longppl_results,
            )


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
    windows = sliding_windows(length, spec.short_context + spec.stride, spec.stride)
    short = sliding_log_probs(model, ids, windows)
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


def _measure(
    tested: ModelUnderTest,
    spec: LongPPL,
    context: EvaluationContext,
    documents: list[HeldOutDocument],
    length: int,
    done: set[Key],
    lengths: Sequence[int | None],
) -> Iterator[Example]:
    import torch

    from skipwise.evaluation.inference import score_tokens

    known = {document.id: document for document in context.held_out.documents}
    for line in _key_lines(tested, spec, context, documents, length):
        if (length, line["document"]) in done or not line["keys"]:
            continue
        text = _text(tested, known[line["document"]])
        if short_hash(text[: line["end"]]) != line["text"]:
            raise UserError(
                f"longppl compares models on the same text, but document {line['document']} reads differently with the "
                "tokenizer of this model. Compare models that keep the text as it is.",
                code="tokenizer_changes_text",
            )
        tokens = tokens_of(tested.tokenizer, text[: line["end"]])
        scored = within(tokens.spans, line["keys"])
        scored[0] = False
        scores = score_tokens(tested.model, torch.from_numpy(tokens.ids)[None], torch.from_numpy(scored)[None])
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
    tested: ModelUnderTest, spec: LongPPL, context: EvaluationContext, documents: list[HeldOutDocument], length: int
) -> Sequence[Example]:
    """The key tokens of every document, chosen by the evaluator where no model before has needed them."""
    name = f"longppl-{length}"
    lines = context.shared.read(name)
    if lines is not None:
        return lines
    from skipwise.models.load import load_model, load_tokenizer
    from skipwise.models.rope import read_window

    found: list[Example] = []
    config = ModelConfig(path=spec.evaluator)
    tokenizer = load_tokenizer(config)
    evaluator = load_model(config, tested.model.device, tested.dtype)
    window = read_window(evaluator.config)
    if window is not None and length > window:
        raise UserError(
            f"The evaluator of longppl must be able to read the context, but {length:,} tokens are more than the "
            f"{window:,} of {spec.evaluator}. Name an evaluator with a longer window, or lower context_lengths.",
            code="evaluator_window_too_short",
        )
    for number, document in enumerate(documents):
        context.log(
            f"longppl: {spec.evaluator} chooses key tokens", detail=f", document {number + 1} of {len(documents)}"
        )
        text = _text(tested, document)
        end, keys = choose_key_spans(evaluator, tokenizer, text, spec, length)
        if end:
            found.append({"document": document.id, "end": end, "text": short_hash(text[:end]), "keys": keys})
    if not found:
        raise UserError(
            f"longppl at {length:,} tokens needs a document that long for the tokenizer of {spec.evaluator}.",
            code="documents_too_short",
        )
    context.shared.write(name, found)
    return found


def _text(tested: ModelUnderTest, document: HeldOutDocument) -> str:
    return decode(tested.tokenizer, document.read().tolist())


def longppl_results(examples: Sequence[Example]) -> list[Result]:
    """As for perplexity, over key tokens; no bits per byte."""
    if not examples:
        raise UserError(
            "the evaluator found no token that needs the long context. Use longer or other documents.",
            code="no_key_tokens",
        )
    return perplexity_results(examples)
