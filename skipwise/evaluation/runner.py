"""Runs evaluations on a model, keeps their examples, and makes rows of them."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from skipwise.errors import UserError
from skipwise.evaluation.inference import reporting
from skipwise.evaluation.measurement import EvaluationContext, Measurement, ModelUnderTest
from skipwise.evaluation.progress import Progress
from skipwise.evaluation.results import EvalResult
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.evaluation.statistics import Example, Result
from skipwise.lengths import format_length
from skipwise.models.forward import autocast
from skipwise.models.rope import has_learned_positions


class Records(Protocol):
    """Where the examples of one model are kept."""

    def read(self, evaluation: str) -> list[Example]:
        """All examples of an evaluation, in the order they were added."""
        ...

    def add(self, evaluation: str, example: Example) -> None:
        """Keep one more, at once."""
        ...


def evaluate(
    tested: ModelUnderTest,
    specs: Sequence[EvaluationSpec],
    context: EvaluationContext,
    records: Records,
    done: set[tuple[str, int | None]],
) -> Iterator[list[EvalResult]]:
    """Every result of the specs for one model, a list of rows per unit.

    Args:
        tested: the model.
        specs: what to measure.
        context: what all models share.
        records: its examples; those that are there are not measured again.
        done: (name of a unit, context length) pairs that have their rows already.
    """
    was_training = tested.model.training
    tested.model.eval()
    try:
        for spec in specs:
            for measurement in spec.measurements(tested, context):
                if not {(measurement.name, length) for length in measurement.context_lengths} <= done:
                    yield _rows(tested, spec, context, records, measurement)
    finally:
        tested.model.train(was_training)


def _rows(
    tested: ModelUnderTest, spec: EvaluationSpec, context: EvaluationContext, records: Records, measurement: Measurement
) -> list[EvalResult]:
    """Measure what is missing of a unit. What fails becomes a row; shorter lengths and other units go on."""
    lengths, rows, examples = list(measurement.context_lengths), [], list[Example]()
    while lengths:
        try:
            examples = _examples(tested, spec, context, records, measurement, lengths)
            break
        except (UserError, MemoryError, RuntimeError) as error:
            rows.append(_row(tested, measurement, lengths.pop(), _failed(measurement, _reason(error))))
    for length in lengths:
        own = [example for example in examples if example["context_length"] == length]
        try:
            rows += [_row(tested, measurement, length, result) for result in measurement.results(own)]
        except UserError as error:
            rows.append(_row(tested, measurement, length, _failed(measurement, str(error))))
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
    tested: ModelUnderTest,
    spec: EvaluationSpec,
    context: EvaluationContext,
    records: Records,
    measurement: Measurement,
    lengths: Sequence[int | None],
) -> list[Example]:
    """All examples of these lengths, those that are there and those that were missing."""
    at = ", ".join(format_length(length) for length in lengths if length is not None)
    what = f"{tested.stage} model: {measurement.name}{f' at {at}' if at else ''}"
    context.log(what)
    examples = [example for example in records.read(spec.name) if example["context_length"] in lengths]
    done = {(example["context_length"], example["example"]) for example in examples}
    _check_positions(tested, lengths)
    # Weights that are in the compute dtype already need no autocast.
    dtype = torch.float32 if tested.model.dtype == tested.dtype else tested.dtype
    progress = Progress(context.log, what, measurement.size, len(examples))
    with autocast(tested.model.device, dtype), reporting(progress.read):
        for example in measurement.measure(done, lengths):
            records.add(spec.name, example)
            examples.append(example)
            progress.example()
    return examples


def _check_positions(tested: ModelUnderTest, lengths: Sequence[int | None]) -> None:
    longest = max((length for length in lengths if length is not None), default=0)
    if has_learned_positions(tested.model.config) and longest > (tested.window or longest):
        raise UserError(
            f"{tested.name} has an embedding for each of its {tested.window:,} positions, and none beyond. "
            "Evaluate shorter contexts.",
            code="beyond_learned_positions",
        )


def _row(tested: ModelUnderTest, measurement: Measurement, length: int | None, result: Result) -> EvalResult:
    beyond = length is not None and tested.window is not None and length > tested.window
    content: Result = {
        "stage": tested.stage,
        "evaluation": measurement.name,
        "data": measurement.data,
        "model": tested.name,
        "depth": None,
        "status": "beyond_window" if beyond else "ok",
        "reason": f"longer than the model's window of {tested.window:,} tokens" if beyond else None,
    }
    return EvalResult(**{**content, **result}, context_length=length)


def _failed(measurement: Measurement, reason: str) -> Result:
    empty: Result = dict.fromkeys(("depth", "value", "stderr", "interval_low", "interval_high"))
    return {**empty, "metric": measurement.metric, "num_samples": 0, "status": "failed", "reason": reason}


def _free_memory(error: BaseException) -> None:
    """Let go of what was being computed, so that the next length has the memory."""
    error.__traceback__ = None
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
