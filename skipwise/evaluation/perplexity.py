"""Perplexity over sliding windows, and of truncated documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from skipwise.errors import UserError
from skipwise.evaluation.measurement import EvaluationContext, Key, Measurement, ModelUnderTest
from skipwise.evaluation.prompts import decode
from skipwise.evaluation.settings import (
    ContextLengths,
    DocumentEvaluation,
    DocumentIds,
    Texts,
    Traits,
    check_at_least_one,
    check_lengths,
)
from skipwise.evaluation.sliding_windows import SlidingWindow, sliding_windows
from skipwise.evaluation.statistics import Example, perplexity_results
from skipwise.utils.files import short_hash
from skipwise.utils.sections import section
from skipwise.utils.settings import Length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skipwise.data.held_out import HeldOut, HeldOutDocument

Tokens = NDArray[np.int64]
# Windows are batched up to this many tokens.
BATCH_TOKENS = 16_384


@section
class Perplexity:
    """Sliding-window perplexity (Press et al., arXiv 2108.12409) of held-out documents.

    Every scored token is predicted exactly once, from at least `context_length - stride` tokens before it (or
    all there are), and fewer than `context_length`. Log-likelihoods are summed over all
    documents and divided by the number of scored tokens. A tokenizer's begin-of-text token stands in front of
    a document, and is context only; windows in the middle of a document have none.

    Attributes:
        context_lengths: window sizes, in tokens.
        stride: tokens the window moves at a time, at most one less than the context length; `None` for 1,024, or
            half the context length where that is less.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens: only documents with at least this many tokens, and never fewer than the largest
            context length that any document reaches.
        document_ids: these documents (number of the source, colon, number of the document) and no others.
        final_tokens: score only this many tokens at the end of each document, which is then cut to
            the largest context length, so that all context lengths score the same tokens
            and only the context differs. `None` scores whole documents, as the paper does.
        max_document_tokens: documents are cut to this many tokens; `None` for no limit.
    """

    traits: ClassVar[Traits] = Traits(
        metric="perplexity", counted="documents", on_documents=True, without_effect=frozenset({"min_document_tokens"})
    )
    name: Literal["perplexity"] = "perplexity"
    context_lengths: ContextLengths
    stride: int | None = None
    documents: int = 50
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None
    final_tokens: int | None = None
    max_document_tokens: Length | None = None

    def __post_init__(self) -> None:
        check_lengths(self.context_lengths)
        check_at_least_one(
            stride=self.stride,
            documents=self.documents,
            final_tokens=self.final_tokens,
            max_document_tokens=self.max_document_tokens,
        )
        if self.max_document_tokens is not None and self.max_document_tokens < max(self.context_lengths):
            raise UserError(
                f"max_document_tokens must not be below the context lengths, but {self.max_document_tokens:,} < "
                f"{max(self.context_lengths):,}. Raise it, or leave it out.",
                code="document_limit_below_context",
            )

    def stride_at(self, context_length: int) -> int:
        """Tokens by which windows of this length move."""
        return min(1024, max(1, context_length // 2)) if self.stride is None else self.stride

    def texts_read(self) -> list[Texts] | None:
        """Windows of all documents; None where the length of the documents decides their number."""
        if self.final_tokens is None and self.max_document_tokens is None:
            return None
        size = self.max_document_tokens or max(self.context_lengths)
        if self.final_tokens is not None:
            size = min(size, max(self.context_lengths))  # where documents are cut
        windows = (
            window.end - window.begin
            for length in self.context_lengths
            for window in sliding_windows(size, length, self.stride_at(length), self.final_tokens)
        )
        documents = self.documents if self.document_ids is None else len(self.document_ids)
        return [Texts(length, documents * count) for length, count in Counter(windows).items()]

    def with_documents(self, ids: tuple[str, ...], lengths: tuple[int, ...]) -> Perplexity:
        """With these documents, which reach these lengths."""
        limit = self.max_document_tokens
        if self.final_tokens is not None:  # where documents are cut decides which tokens are the last ones
            limit = min(lengths[-1], limit or lengths[-1])
        return replace(self, context_lengths=lengths, document_ids=ids, max_document_tokens=limit)

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for each context length; an example is a document."""
        documents, reached = chosen(self, context)
        limit = self.max_document_tokens
        if self.final_tokens is not None and reached:
            limit = min(reached[-1], limit or reached[-1])
        for length in reached:
            yield Measurement(
                name=self.name,
                context_lengths=(length,),
                data=described(context.held_out, documents),
                metric=self.traits.metric,
                size=len(documents),
                measure=partial(_measure_sliding, tested, self, documents, length, limit),
                results=perplexity_results,
            )


@section
class TruncatedPerplexity:
    """Perplexity of the first `context_length` tokens of each held-out document.

    One forward pass gives every length, since a causal model's predictions do not depend on what
    follows. A length that no document reaches is absent.

    Attributes:
        context_lengths: where documents are cut, in tokens.
        documents: number of documents; which ones is drawn by the seed.
        min_document_tokens, document_ids: as for `perplexity`.
    """

    traits: ClassVar[Traits] = Traits(
        metric="perplexity", counted="documents", on_documents=True, without_effect=frozenset({"min_document_tokens"})
    )
    name: Literal["truncated_perplexity"] = "truncated_perplexity"
    context_lengths: ContextLengths
    documents: int = 50
    min_document_tokens: Length | None = None
    document_ids: DocumentIds = None

    def __post_init__(self) -> None:
        check_lengths(self.context_lengths)
        check_at_least_one(documents=self.documents)

    def texts_read(self) -> list[Texts]:
        """The longest beginning of every document."""
        documents = self.documents if self.document_ids is None else len(self.document_ids)
        return [Texts(max(self.context_lengths), documents)]

    def with_documents(self, ids: tuple[str, ...], lengths: tuple[int, ...]) -> TruncatedPerplexity:
        """With these documents, which reach these lengths."""
        return replace(self, context_lengths=lengths, document_ids=ids)

    def measurements(self, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Measurement]:
        """One measurement for all context lengths, since one pass over a document gives them all."""
        from skipwise.evaluation.measurement import Measurement
        from skipwise.models.rope import length_dependent

        documents, reached = chosen(self, context)
        # Where it does not, every length is refused, each in a row of its own.
        together = [tuple(reached)] if length_dependent(tested.model.config) is None else [(one,) for one in reached]
        for lengths in together if reached else ():
            yield Measurement(
                name=self.name,
                context_lengths=lengths,
                data=described(context.held_out, documents),
                metric=self.traits.metric,
                size=len(documents) * len(lengths),
                measure=partial(_measure_truncated, tested, documents, len(reached)),
                results=perplexity_results,
            )


def sliding_log_probs(model: PreTrainedModel, document: Tokens, windows: list[SlidingWindow]) -> NDArray[np.float64]:
    """float64[m]: log-likelihoods of the scored tokens of all windows, in the order of the document.

    Windows that look alike are read together.
    """
    import torch

    from skipwise.evaluation.inference import score_tokens

    alike: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(windows):
        alike.setdefault((window.end - window.begin, window.score_from - window.begin), []).append(number)
    found: dict[int, NDArray[np.float64]] = {}
    for (width, first), numbers in alike.items():
        size = max(1, BATCH_TOKENS // width)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            ids = np.stack([document[windows[number].begin : windows[number].end] for number in batch])
            scored = torch.arange(width).expand(len(batch), -1) >= first
            scores = score_tokens(model, torch.from_numpy(ids), scored)
            found.update(zip(batch, scores.log_probs.double().numpy().reshape(len(batch), -1), strict=True))
    return np.concatenate([found[number] for number in range(len(windows))])


def text_content(tokenizer: PreTrainedTokenizerBase, ids: Tokens, start: int, stop: int) -> Example:
    """What an example says of the text of tokens [start, stop), for comparing models.

    Returns:
        `bytes`: in UTF-8, at most 3 off where a character is cut; `prompt`: hash of all text up to `stop`.
    """
    before, whole = (decode(tokenizer, ids[:end].tolist()) for end in (start, stop))
    size = len(whole.encode("utf-8", "replace")) - len(before.encode("utf-8", "replace"))
    return {"bytes": size, "prompt": short_hash(whole)}


def _measure_sliding(
    tested: ModelUnderTest,
    spec: Perplexity,
    documents: list[HeldOutDocument],
    length: int,
    limit: int | None,
    done: set[Key],
    lengths: Sequence[int | None],
) -> Iterator[Example]:
    for document in documents:
        if (length, document.id) not in done:
            ids = document.read(limit)
            windows = sliding_windows(len(ids), length, spec.stride_at(length), spec.final_tokens)
            log_probs = sliding_log_probs(tested.model, ids, windows)
            yield {
                "context_length": length,
                "example": document.id,
                "nll": -float(log_probs.sum()),
                "tokens": len(log_probs),
                **text_content(tested.tokenizer, ids, windows[0].score_from, len(ids)),
            }


def _measure_truncated(
    tested: ModelUnderTest,
    documents: list[HeldOutDocument],
    asked: int,
    done: set[Key],
    context_lengths: Sequence[int | None],
) -> Iterator[Example]:
    check_one_pass(tested.model, asked)
    lengths = [length for length in context_lengths if length is not None]
    for document in documents:
        if {(length, document.id) for length in lengths} <= done:
            continue
        ids = document.read(lengths[-1])
        sums = truncated_sums(tested.model, ids)
        for length in lengths:
            if (length, document.id) not in done:
                yield {
                    "context_length": length,
                    "example": document.id,
                    "nll": -float(sums[length - 2]),
                    "tokens": length - 1,
                    **text_content(tested.tokenizer, ids, 1, length),
                }


def truncated_sums(model: PreTrainedModel, ids: Tokens) -> NDArray[np.float64]:
    """float64[n - 1]: summed log-likelihood of tokens 1 ... i + 1, for every i, from one pass."""
    import torch

    from skipwise.evaluation.inference import score_tokens

    scored = torch.ones(1, len(ids), dtype=torch.bool)
    scored[:, 0] = False
    scores = score_tokens(model, torch.from_numpy(ids)[None], scored)
    sums: NDArray[np.float64] = np.cumsum(scores.log_probs.double().numpy())
    return sums


def check_one_pass(model: PreTrainedModel, lengths: int) -> None:
    """Raise `UserError` when a model reads the beginning of a text differently when more follows (trap 11)."""
    from skipwise.models.rope import length_dependent

    rope_type = length_dependent(model.config)
    if rope_type is not None and lengths > 1:
        raise UserError(
            f"truncated_perplexity takes all lengths from one pass, but the {rope_type!r} RoPE of this model "
            "depends on the length of its input. Ask for one length at a time, or use perplexity.",
            code="length_dependent_rope",
        )


def described(held_out: HeldOut, documents: Sequence[HeldOutDocument]) -> str:
    """What a result was measured on, for its row."""
    return f"{held_out.name}, {len(documents)} {'document' if len(documents) == 1 else 'documents'}"


def chosen(spec: DocumentEvaluation, context: EvaluationContext) -> tuple[list[HeldOutDocument], list[int]]:
    """Documents and reached lengths of a spec; says which lengths no document reaches."""
    from skipwise.data.held_out import choose_documents

    documents, reached = choose_documents(
        context.held_out.documents,
        spec.context_lengths,
        spec.documents,
        context.seed,
        spec.min_document_tokens if spec.document_ids is None else None,
        spec.document_ids,
    )
    for length in sorted(set(spec.context_lengths) - set(reached)):
        context.log(f"no {spec.name} at {length:,} tokens: no document is that long", stay=True)
    if spec.document_ids is not None and len(documents) < len(spec.document_ids):
        fewer = f"{len(documents)} of {len(spec.document_ids)} documents"
        context.log(f"{spec.name}: only {fewer} are long enough with this tokenizer", stay=True)
    return documents, reached
