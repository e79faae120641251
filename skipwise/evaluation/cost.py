"""What an evaluation will read, from its settings alone. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from skipwise.evaluation.slides import sliding_windows, stride_of
from skipwise.evaluation.specs import (
    EvaluationSpec,
    Harness,
    Passkey,
    Perplexity,
    QuestionAnswering,
    Ruler,
    Summarization,
    TruncatedPerplexity,
)
from skipwise.lengths import format_length


def describe_evaluation(specs: Sequence[EvaluationSpec]) -> str:
    """A line for each: `"passkey at 256, 1k, 4k tokens, trials: 20, about 107,520 tokens to read"`."""
    lines = []
    for spec in specs:
        name = spec.name.replace("_", " ")
        if isinstance(spec, Harness):
            lines.append(f"{name}: {', '.join(spec.tasks)}")
            continue
        settings = asdict(spec)
        unit = next(unit for unit in ("trials", "samples", "documents") if unit in settings)
        count = len(settings.get("document_ids") or ()) or settings[unit]
        tokens = tokens_read(spec)
        cost = "" if tokens is None else f", about {tokens:,} tokens to read"
        lengths = ", ".join(map(format_length, spec.context_lengths))
        lines.append(f"{name} at {lengths} tokens, {unit}: {'up to ' * (unit == 'documents')}{count}{cost}")
    return "\n".join(lines)


def tokens_read(spec: EvaluationSpec) -> int | None:
    """Tokens that an evaluation reads of one model where it finds all the documents it asks for.

    Prompts that share a beginning are counted in full, but for the keys of one passkey prompt. None where it depends
    on the tasks, on an evaluator, or on how long whole documents are.
    """
    texts = texts_read(spec)
    return None if texts is None else sum(length * count for length, count in texts.items())


def texts_read(spec: EvaluationSpec) -> dict[int, int] | None:
    """How many texts of each length `tokens_read` counts; None where it is None."""
    match spec:
        case Perplexity(final_tokens=int()) | Perplexity(max_document_tokens=int()):
            size = spec.max_document_tokens or max(spec.context_lengths)
            if spec.final_tokens is not None:
                size = min(size, max(spec.context_lengths))  # where documents are cut
            slides = (
                slide.end - slide.begin
                for length in spec.context_lengths
                for slide in sliding_windows(size, length, stride_of(spec, length), spec.final_tokens)
            )
            return {length: _documents(spec) * count for length, count in Counter(slides).items()}
        case TruncatedPerplexity():
            return {max(spec.context_lengths): _documents(spec)}
        case Passkey():
            return dict.fromkeys(spec.context_lengths, spec.trials // spec.keys_per_prompt)
        case Ruler():
            return dict.fromkeys(spec.context_lengths, spec.samples * len(spec.tasks))
        case QuestionAnswering() | Summarization():
            return dict.fromkeys(spec.context_lengths, spec.samples)
        case _:
            return None


def _documents(spec: Perplexity | TruncatedPerplexity) -> int:
    return spec.documents if spec.document_ids is None else len(spec.document_ids)
