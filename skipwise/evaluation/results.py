"""Rows of results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Stage = Literal["original", "interpolated", "extended"]

# Name of what is measured at once (of the harness one task), and context length.
ResultKey = tuple[str, int | None]
Status = Literal["ok", "beyond_window", "failed"]


@dataclass(frozen=True)
class EvalResult:
    """One result, as one tidy row.

    Attributes:
        stage: `original`, `interpolated` (new RoPE, no training) or `extended`.
        evaluation: name of the evaluation; of a task of a suite, `suite/task`.
        data: what it was measured on.
        context_length: tokens; None for tasks that have no length of their own.
        depth: where in the context, in [0, 1]; None when pooled or not applicable.
        metric: `perplexity`, `bits_per_byte`, `accuracy`, `score`, `f1`, `rouge1`, ...
        value: the result; None when status is `failed`.
        stderr: its standard error, in the units of `value`.
        interval_low, interval_high: 95 % interval.
        num_samples: what the result is a mean over: tokens, bytes or prompts.
        status: `ok`, `beyond_window` (longer than the model's own window: measured all the same, or
            not measurable) or `failed`.
        reason: why, unless `ok`.
        model: path or id of the model.
    """

    stage: Stage
    evaluation: str
    data: str
    context_length: int | None
    depth: float | None
    metric: str
    value: float | None
    stderr: float | None
    interval_low: float | None
    interval_high: float | None
    num_samples: int
    status: Status
    reason: str | None
    model: str

    def as_row(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)


# A fall of passkey accuracy inside the original window by more than this is worth a warning.
RETRIEVAL_FALL = 0.1


def retrieval_warnings(rows: list[EvalResult], original: int, remedies: bool = True) -> list[str]:
    """One warning per length inside the original window where retrieval fell, and what perplexity did.

    Perplexity can improve while retrieval dies, so a run must not be judged by the former alone.

    Args:
        rows: of `results.jsonl`.
        original: length of the original window, in tokens.
        remedies: say what to do about it, too, which who trains it wants to know and who uses it does not.
    """
    values = {
        (row.stage, row.evaluation, row.context_length): row.value
        for row in rows
        if row.context_length is not None
        and row.depth is None
        and row.value is not None
        and row.metric in ("accuracy", "perplexity")
    }
    improved: dict[int, str] = {}  # by length: what it did elsewhere says nothing of a fall here
    for (stage, name, length), before in sorted(values.items()):
        trained = values.get(("extended", name, length), before)
        if stage == "original" and name != "passkey" and trained < before:
            said = f"although {name.replace('_', ' ')} there improved from {before:.4g} to {trained:.4g}"
            improved.setdefault(length, said)
    warnings = []
    for (stage, name, length), before in sorted(values.items(), key=lambda item: item[0][2]):
        after = values.get(("extended", name, length))
        if (stage, name) != ("original", "passkey") or length > original or after is None:
            continue
        if before - after > RETRIEVAL_FALL:
            untrained = values.get(("interpolated", name, length))
            remedy = (
                "Lower train.learning_rate, raise data.retrieval_share, train.untouched_share or train.kl_weight."
                if untrained is None or after < untrained
                else f"The new RoPE alone has {untrained:.0%}: train longer, or choose another rope."
            )
            fall = f"passkey accuracy at {length:,} tokens fell from {before:.0%} to {after:.0%}"
            fall += _by_chance(rows, length)
            said = " ".join(part for part in (fall, improved.get(length)) if part)
            warnings.append(f"{said}.{f' {remedy}' if remedies else ''}")
    return warnings


def _by_chance(rows: list[EvalResult], length: int) -> str:
    """Whether the intervals of two shares leave open that nothing fell."""
    of = [row for row in rows if (row.evaluation, row.context_length, row.depth) == ("passkey", length, None)]
    before, after = ({row.stage: row for row in of}.get(stage) for stage in ("original", "extended"))
    if before is None or after is None or before.interval_low is None or after.interval_high is None:
        return ""
    return f" (of {after.num_samples}: it may be chance)" if after.interval_high >= before.interval_low else ""


def result_key(row: EvalResult) -> ResultKey:
    """What a row was measured with, at once: the evaluation (of the harness one task), and the context length."""
    suite, *task = row.evaluation.split("/")
    return (f"{suite}/{task[0]}" if suite == "harness" and task else suite), row.context_length
