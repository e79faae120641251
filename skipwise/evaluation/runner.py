"""Runs evaluations on a model, keeps their examples, and makes rows of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from skipwise.errors import UserError
from skipwise.evaluation.applications import question_units, summary_units
from skipwise.evaluation.figures import Example, Figure
from skipwise.evaluation.harness import harness_units
from skipwise.evaluation.longppl import longppl_units
from skipwise.evaluation.passkey import passkey_units
from skipwise.evaluation.perplexity import perplexity_units, truncated_units
from skipwise.evaluation.ruler import ruler_units
from skipwise.evaluation.specs import (
    EvalResult,
    EvaluationSpec,
    Harness,
    LongPPL,
    Passkey,
    Perplexity,
    QuestionAnswering,
    Ruler,
    Summarization,
    TruncatedPerplexity,
)
from skipwise.evaluation.unit import Progress, Setting, Subject, Unit
from skipwise.lengths import format_length
from skipwise.models.forward import autocast
from skipwise.models.reading import told
from skipwise.models.rope import has_learned_positions

# The one place to add how an evaluation is measured; what can be set about it is in `specs`.
UNITS: dict[type[EvaluationSpec], Callable[[Subject, Any, Setting], Iterator[Unit]]] = {
    Perplexity: perplexity_units,
    TruncatedPerplexity: truncated_units,
    LongPPL: longppl_units,
    Passkey: passkey_units,
    Ruler: ruler_units,
    QuestionAnswering: question_units,
    Summarization: summary_units,
    Harness: harness_units,
}


class Records(Protocol):
    """Where the examples of one model are kept."""

    def read(self, evaluation: str) -> list[Example]:
        """All examples of an evaluation, in the order they were added."""
        ...

    def add(self, evaluation: str, example: Example) -> None:
        """Keep one more, at once."""
        ...


def evaluate(
    subject: Subject,
    specs: tuple[EvaluationSpec, ...],
    setting: Setting,
    records: Records,
    done: set[tuple[str, int | None]],
) -> Iterator[list[EvalResult]]:
    """Every figure of the specs for one model, a list of rows per unit.

    Args:
        subject: the model.
        specs: what to measure.
        setting: what all models share.
        records: its examples; those that are there are not measured again.
        done: (name of a unit, context length) pairs that have their rows already.
    """
    was_training = subject.model.training
    subject.model.eval()
    try:
        for spec in specs:
            for unit in UNITS[type(spec)](subject, spec, setting):
                if not {(unit.name, length) for length in unit.context_lengths} <= done:
                    yield _rows(subject, spec, setting, records, unit)
    finally:
        subject.model.train(was_training)


def _rows(subject: Subject, spec: EvaluationSpec, setting: Setting, records: Records, unit: Unit) -> list[EvalResult]:
    """Measure what is missing of a unit. What fails becomes a row; shorter lengths and other units go on."""
    lengths, rows, examples = list(unit.context_lengths), [], list[Example]()
    while lengths:
        try:
            examples = _examples(subject, spec, setting, records, unit, lengths)
            break
        except (UserError, MemoryError, RuntimeError) as error:
            rows.append(_row(subject, unit, lengths.pop(), _failed(unit, _reason(error))))
    for length in lengths:
        own = [example for example in examples if example["context_length"] == length]
        try:
            rows += [_row(subject, unit, length, figure) for figure in unit.figures(own)]
        except UserError as error:
            rows.append(_row(subject, unit, length, _failed(unit, str(error))))
    return rows


def _reason(error: Exception) -> str:
    """Why a measurement failed; raises what is our own mistake."""
    if isinstance(error, UserError):
        return str(error)
    if not is_out_of_memory(error):
        raise error
    _free_memory(error)
    return "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, an accelerator or torch's CPU allocator say that memory is short."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in said or "allocate memory" in said
    )


def _examples(
    subject: Subject,
    spec: EvaluationSpec,
    setting: Setting,
    records: Records,
    unit: Unit,
    lengths: Sequence[int | None],
) -> list[Example]:
    """All examples of these lengths, those that are there and those that were missing."""
    at = ", ".join(format_length(length) for length in lengths if length is not None)
    what = f"{subject.stage} model: {unit.name}{f' at {at}' if at else ''}"
    setting.say(what)
    examples = [example for example in records.read(spec.name) if example["context_length"] in lengths]
    done = {(example["context_length"], example["example"]) for example in examples}
    _check_positions(subject, lengths)
    # Weights that are in the dtype of the products already need no autocast.
    dtype = torch.float32 if subject.model.dtype == subject.dtype else subject.dtype
    progress = Progress(setting.say, what, unit.size, len(examples))
    with autocast(subject.model.device, dtype), told(progress.read):
        for example in unit.measure(done, lengths):
            records.add(spec.name, example)
            examples.append(example)
            progress.example()
    return examples


def _check_positions(subject: Subject, lengths: Sequence[int | None]) -> None:
    longest = max((length for length in lengths if length is not None), default=0)
    if has_learned_positions(subject.model.config) and longest > (subject.window or longest):
        raise UserError(
            f"{subject.name} has an embedding for each of its {subject.window:,} positions, and none beyond. "
            "Evaluate shorter contexts.",
            code="beyond_learned_positions",
        )


def _row(subject: Subject, unit: Unit, length: int | None, figure: Figure) -> EvalResult:
    beyond = length is not None and subject.window is not None and length > subject.window
    content: Figure = {
        "stage": subject.stage,
        "evaluation": unit.name,
        "data": unit.data,
        "model": subject.name,
        "depth": None,
        "status": "beyond_window" if beyond else "ok",
        "reason": f"longer than the model's window of {subject.window:,} tokens" if beyond else None,
    }
    return EvalResult(**{**content, **figure}, context_length=length)


def _failed(unit: Unit, reason: str) -> Figure:
    empty: Figure = dict.fromkeys(("depth", "value", "stderr", "interval_low", "interval_high"))
    return {**empty, "metric": unit.metric, "num_samples": 0, "status": "failed", "reason": reason}


def _free_memory(error: BaseException) -> None:
    """Let go of what was being computed, so that the next length has the memory."""
    error.__traceback__ = None
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
