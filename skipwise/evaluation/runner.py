"""Runs evaluations on a model and makes rows of their figures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.evaluation.passkey import passkey_figures
from skipwise.evaluation.perplexity import Tokens, choose_documents, perplexity_figures, truncated_perplexity_figures
from skipwise.evaluation.specs import EvalResult, EvaluationSpec, Passkey, Perplexity, Stage
from skipwise.models.forward import autocast


class Say(Protocol):
    """Tells what is going on; `stay` for what must not be overwritten by the next."""

    def __call__(self, text: str, *, stay: bool = False) -> None:
        """Tell it."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        stage: which state of it.
        name: path or id, for the rows.
        window: tokens it claims to handle; longer contexts are flagged.
        dtype: compute dtype.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stage: Stage
    name: str
    window: int
    dtype: torch.dtype


@dataclass(frozen=True)
class HeldOut:
    """Documents to score, with the tokenizer's begin-of-text tokens in front, and what to call them."""

    name: str
    documents: list[Tokens]


def evaluate(
    subject: Subject,
    specs: tuple[EvaluationSpec, ...],
    held_out: HeldOut,
    seed: int,
    done: set[tuple[str, int]],
    say: Say,
) -> Iterator[list[EvalResult]]:
    """Every figure of the specs for one model, a list of rows per evaluation and length.

    Args:
        subject: the model.
        specs: what to measure.
        held_out: documents for perplexities.
        seed: of the passkeys; the same for every model that is compared.
        done: (evaluation, context length) pairs that are measured already.
        say: told what is being measured now.
    """
    was_training = subject.model.training
    subject.model.eval()
    try:
        for spec in specs:
            for lengths, measure in _tasks(subject, spec, held_out, seed, say):
                if not {(spec.name, length) for length in lengths} <= done:
                    shown = ", ".join(f"{length:,}" for length in lengths)
                    say(f"{subject.stage} model: {spec.name} at {shown}")
                    yield _rows(subject, spec, held_out, lengths, measure)
    finally:
        subject.model.train(was_training)


Figures = dict[str, Any]
Task = tuple[list[int], Callable[[], list[tuple[int, Figures]]]]


def _tasks(subject: Subject, spec: EvaluationSpec, held_out: HeldOut, seed: int, say: Say) -> Iterator[Task]:
    """(context lengths, measurement) pairs; one measurement may give several lengths."""
    if isinstance(spec, Passkey):
        for length in spec.context_lengths:
            yield [length], partial(_passkey, subject, spec, length, seed)
        return
    documents, reached = choose_documents(held_out.documents, spec.context_lengths, spec.documents)
    for length in sorted(set(spec.context_lengths) - set(reached)):
        say(f"no {spec.name} at {length:,} tokens: no held-out document is that long", stay=True)
    if isinstance(spec, Perplexity):
        if spec.final_tokens is not None and reached:
            documents = [document[: reached[-1]] for document in documents]
        documents = [document[: spec.max_document_tokens] for document in documents]
        for length in reached:
            yield [length], partial(_perplexity, subject, documents, spec, length)
    elif reached:
        yield reached, partial(_truncated, subject, documents, reached)


def _passkey(subject: Subject, spec: Passkey, length: int, seed: int) -> list[tuple[int, Figures]]:
    return [(length, f) for f in passkey_figures(subject.model, subject.tokenizer, spec, length, seed)]


def _perplexity(subject: Subject, documents: list[Tokens], spec: Perplexity, length: int) -> list[tuple[int, Figures]]:
    return [(length, perplexity_figures(subject.model, documents, spec, length))]


def _truncated(subject: Subject, documents: list[Tokens], lengths: list[int]) -> list[tuple[int, Figures]]:
    return list(truncated_perplexity_figures(subject.model, documents, lengths).items())


def _rows(
    subject: Subject,
    spec: EvaluationSpec,
    held_out: HeldOut,
    lengths: list[int],
    measure: Callable[[], list[tuple[int, Figures]]],
) -> list[EvalResult]:
    data = "passkey prompts" if isinstance(spec, Passkey) else held_out.name
    common: Figures = {"stage": subject.stage, "evaluation": spec.name, "data": data, "model": subject.name}
    try:
        with autocast(subject.model.device, subject.dtype):
            figures = measure()
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        empty: Figures = dict.fromkeys(("depth", "value", "stderr", "interval_low", "interval_high"))
        metric = "accuracy" if isinstance(spec, Passkey) else "perplexity"
        failed = {
            **empty,
            "metric": metric,
            "num_samples": 0,
            "status": "failed",
            "reason": str(error) or "out of memory",
        }
        return [EvalResult(**common, **failed, context_length=length) for length in lengths]
    rows = []
    for length, figure in figures:
        beyond = length > subject.window
        reason = f"longer than the model's window of {subject.window:,} tokens" if beyond else None
        status: Figures = {"status": "beyond_window" if beyond else "ok", "reason": reason}
        rows.append(EvalResult(**{**common, "depth": None, **figure, **status}, context_length=length))
    return rows
