"""Describe what evaluations will read, from their settings alone. No torch."""

from collections.abc import Sequence

from skipwise.evaluation.specs import EvaluationSpec, on_documents
from skipwise.lengths import format_length


def describe_evaluation(specs: Sequence[EvaluationSpec]) -> str:
    """A line for each: `"passkey at 256, 1k, 4k tokens, trials: 20, about 107,520 tokens to read"`."""
    return "\n".join(map(_describe, specs))


def _describe(spec: EvaluationSpec) -> str:
    name, counted = spec.name.replace("_", " "), spec.traits.counted
    if spec.traits.results_by == counted:
        return f"{name}: {', '.join(getattr(spec, counted))}"
    documents = on_documents(spec)
    count = len((documents and documents.document_ids) or ()) or getattr(spec, counted)
    tokens = tokens_read(spec)
    cost = "" if tokens is None else f", about {tokens:,} tokens to read"
    lengths = ", ".join(format_length(length) for length in spec.context_lengths if length is not None)
    return f"{name} at {lengths} tokens, {counted}: {'up to ' * (documents is not None)}{count}{cost}"


def tokens_read(spec: EvaluationSpec) -> int | None:
    """Tokens that an evaluation reads of one model where it finds all the documents it asks for.

    Prompts that share a beginning are counted in full, but for the keys of one passkey prompt. None where it depends
    on the tasks, on an evaluator, or on how long whole documents are.
    """
    texts = spec.texts_read()
    return None if texts is None else sum(one.length * one.count for one in texts)
