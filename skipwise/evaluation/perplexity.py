"""Perplexity over sliding windows, and of truncated documents."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.data.held_out import HeldOut, HeldOutDocument, choose_documents
from skipwise.digests import short_digest
from skipwise.errors import UserError
from skipwise.evaluation.figures import Example, perplexity_figures
from skipwise.evaluation.prompts import decode
from skipwise.evaluation.slides import Slide, sliding_windows, stride_of
from skipwise.evaluation.specs import LongPPL, Perplexity, TruncatedPerplexity
from skipwise.evaluation.unit import Key, Setting, Subject, Unit
from skipwise.models.reading import score_tokens
from skipwise.models.rope import length_dependent

Tokens = NDArray[np.int64]
# Windows are batched up to this many tokens.
BATCH_TOKENS = 16_384


def sliding_log_probs(model: PreTrainedModel, document: Tokens, slides: list[Slide]) -> NDArray[np.float64]:
    """float64[m]: log-likelihoods of the scored tokens of all windows, in the order of the document.

    Windows that look alike are read together.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for number, slide in enumerate(slides):
        alike.setdefault((slide.end - slide.begin, slide.score_from - slide.begin), []).append(number)
    found: dict[int, NDArray[np.float64]] = {}
    for (width, first), numbers in alike.items():
        size = max(1, BATCH_TOKENS // width)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            ids = np.stack([document[slides[number].begin : slides[number].end] for number in batch])
            scored = torch.arange(width).expand(len(batch), -1) >= first
            scores = score_tokens(model, torch.from_numpy(ids), scored)
            found.update(zip(batch, scores.log_probs.double().numpy().reshape(len(batch), -1), strict=True))
    return np.concatenate([found[number] for number in range(len(slides))])


def text_content(tokenizer: PreTrainedTokenizerBase, ids: Tokens, start: int, stop: int) -> Example:
    """What an example says of the text of tokens [start, stop), for comparing models.

    Returns:
        `bytes`: in UTF-8, at most 3 off where a character is cut; `prompt`: hash of all text up to `stop`.
    """
    before, whole = (decode(tokenizer, ids[:end].tolist()) for end in (start, stop))
    size = len(whole.encode("utf-8", "replace")) - len(before.encode("utf-8", "replace"))
    return {"bytes": size, "prompt": short_digest(whole)}


def perplexity_units(subject: Subject, spec: Perplexity, setting: Setting) -> Iterator[Unit]:
    """A unit per context length; an example is a document."""
    documents, reached = chosen(spec, setting)
    limit = spec.max_document_tokens
    if spec.final_tokens is not None and reached:
        limit = min(reached[-1], limit or reached[-1])
    for length in reached:
        yield Unit(
            name=spec.name,
            context_lengths=(length,),
            data=described(setting.held_out, documents),
            metric="perplexity",
            size=len(documents),
            measure=partial(_measure_sliding, subject, spec, documents, length, limit),
            figures=perplexity_figures,
        )


def _measure_sliding(
    subject: Subject,
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
            slides = sliding_windows(len(ids), length, stride_of(spec, length), spec.final_tokens)
            log_probs = sliding_log_probs(subject.model, ids, slides)
            yield {
                "context_length": length,
                "example": document.id,
                "nll": -float(log_probs.sum()),
                "tokens": len(log_probs),
                **text_content(subject.tokenizer, ids, slides[0].score_from, len(ids)),
            }


def truncated_units(subject: Subject, spec: TruncatedPerplexity, setting: Setting) -> Iterator[Unit]:
    """One unit for all context lengths, since one pass over a document gives them all."""
    documents, reached = chosen(spec, setting)
    # Where it does not, every length is refused, each in a row of its own.
    together = [tuple(reached)] if length_dependent(subject.model.config) is None else [(one,) for one in reached]
    for lengths in together if reached else ():
        yield Unit(
            name=spec.name,
            context_lengths=lengths,
            data=described(setting.held_out, documents),
            metric="perplexity",
            size=len(documents) * len(lengths),
            measure=partial(_measure_truncated, subject, documents, len(reached)),
            figures=perplexity_figures,
        )


def _measure_truncated(
    subject: Subject,
    documents: list[HeldOutDocument],
    asked: int,
    done: set[Key],
    context_lengths: Sequence[int | None],
) -> Iterator[Example]:
    check_one_pass(subject.model, asked)
    lengths = [length for length in context_lengths if length is not None]
    for document in documents:
        if {(length, document.id) for length in lengths} <= done:
            continue
        ids = document.read(lengths[-1])
        sums = truncated_sums(subject.model, ids)
        for length in lengths:
            if (length, document.id) not in done:
                yield {
                    "context_length": length,
                    "example": document.id,
                    "nll": -float(sums[length - 2]),
                    "tokens": length - 1,
                    **text_content(subject.tokenizer, ids, 1, length),
                }


def truncated_sums(model: PreTrainedModel, ids: Tokens) -> NDArray[np.float64]:
    """float64[n - 1]: summed log-likelihood of tokens 1 ... i + 1, for every i, from one pass."""
    scored = torch.ones(1, len(ids), dtype=torch.bool)
    scored[:, 0] = False
    scores = score_tokens(model, torch.from_numpy(ids)[None], scored)
    sums: NDArray[np.float64] = np.cumsum(scores.log_probs.double().numpy())
    return sums


def check_one_pass(model: PreTrainedModel, lengths: int) -> None:
    """Raise `UserError` when a model reads the beginning of a text differently when more follows (trap 11)."""
    rope_type = length_dependent(model.config)
    if rope_type is not None and lengths > 1:
        raise UserError(
            f"truncated_perplexity takes all lengths from one pass, but the {rope_type!r} RoPE of this model "
            "depends on the length of its input. Ask for one length at a time, or use perplexity.",
            code="length_dependent_rope",
        )


def described(held_out: HeldOut, documents: Sequence[HeldOutDocument]) -> str:
    """What a figure was measured on, for its row."""
    return f"{held_out.name}, {len(documents)} {'document' if len(documents) == 1 else 'documents'}"


def chosen(
    spec: Perplexity | TruncatedPerplexity | LongPPL, setting: Setting
) -> tuple[list[HeldOutDocument], list[int]]:
    """Documents and reached lengths of a spec; says which lengths no document reaches."""
    documents, reached = choose_documents(
        setting.held_out.documents,
        spec.context_lengths,
        spec.documents,
        setting.seed,
        spec.min_document_tokens if spec.document_ids is None else None,
        spec.document_ids,
    )
    for length in sorted(set(spec.context_lengths) - set(reached)):
        setting.say(f"no {spec.name} at {length:,} tokens: no document is that long", stay=True)
    if spec.document_ids is not None and len(documents) < len(spec.document_ids):
        fewer = f"{len(documents)} of {len(spec.document_ids)} documents"
        setting.say(f"{spec.name}: only {fewer} are long enough with this tokenizer", stay=True)
    return documents, reached
