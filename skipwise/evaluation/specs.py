"""What can be evaluated, and the row every figure ends up in. No torch, so that config can import it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Strict

from skipwise.errors import UserError
from skipwise.lengths import parse_length
from skipwise.sections import section

Length = Annotated[int, BeforeValidator(parse_length), Field(ge=1)]
ContextLengths = Annotated[tuple[Length, ...], Strict(False)]

Stage = Literal["original", "interpolated", "extended"]
Status = Literal["ok", "beyond_window", "failed"]


def _check_lengths(context_lengths: tuple[int, ...]) -> None:
    if not context_lengths or min(context_lengths) < 2 or len(set(context_lengths)) < len(context_lengths):
        raise UserError(
            f"context_lengths must be different lengths of at least 2 tokens, not {list(context_lengths)}. "
            "Give for example [4096, 32768]."
        )


def _check_at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}.")


@section
class Perplexity:
    """Sliding-window perplexity (Press et al., arXiv 2108.12409) of held-out documents.

    Every scored token is predicted exactly once, from at most `context_length` and (after the first
    window) more than `context_length - stride` tokens before it. Log-likelihoods are summed over all
    documents and divided by the number of scored tokens.

    Attributes:
        context_lengths: window sizes, in tokens.
        stride: tokens the window moves at a time; capped at the context length.
        documents: number of held-out documents, the longest ones first.
        final_tokens: score only this many tokens at the end of each document, which is then cut to
            the largest context length, so that all context lengths score the same tokens
            and only the context differs. `None` scores whole documents, as the paper does.
        max_document_tokens: documents are cut to this many tokens; `None` for no limit.
    """

    name: Literal["perplexity"] = "perplexity"
    context_lengths: ContextLengths
    stride: int = 1024
    documents: int = 50
    final_tokens: int | None = None
    max_document_tokens: Length | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(
            stride=self.stride,
            documents=self.documents,
            final_tokens=self.final_tokens,
            max_document_tokens=self.max_document_tokens,
        )
        if self.max_document_tokens is not None and self.max_document_tokens < max(self.context_lengths):
            raise UserError(
                f"max_document_tokens must not be below the context lengths, but {self.max_document_tokens:,} < "
                f"{max(self.context_lengths):,}. Raise it, or leave it out."
            )


@section
class TruncatedPerplexity:
    """Perplexity of the first `context_length` tokens of each held-out document.

    One forward pass gives every length, since a causal model's predictions do not depend on what
    follows. A length that no document reaches is absent.

    Attributes:
        context_lengths: where documents are cut, in tokens.
        documents: number of held-out documents, the longest ones first.
    """

    name: Literal["truncated_perplexity"] = "truncated_perplexity"
    context_lengths: ContextLengths
    documents: int = 50

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(documents=self.documents)


@section
class Passkey:
    """Passkey retrieval (Mohtashami & Jaggi, arXiv 2305.16300; PoSE paper, Figure 2a).

    A five-digit key is hidden among repeated filler sentences; the greedy answer must begin with it.

    Attributes:
        context_lengths: length of prompt and answer together, in tokens.
        trials: keys per length; their depths are spread evenly over the filler.
    """

    name: Literal["passkey"] = "passkey"
    context_lengths: ContextLengths
    trials: int = 50

    def __post_init__(self) -> None:
        _check_lengths(self.context_lengths)
        _check_at_least_one(trials=self.trials)


EvaluationSpec = Perplexity | TruncatedPerplexity | Passkey
EVALUATIONS: tuple[type[EvaluationSpec], ...] = get_args(EvaluationSpec)


@dataclass(frozen=True)
class EvalResult:
    """One figure, as one tidy row.

    Attributes:
        stage: `original`, `interpolated` (new RoPE, no training) or `extended`.
        evaluation: name of the evaluation.
        data: what it was measured on.
        context_length: tokens.
        depth: where in the context, in [0, 1]; None when pooled or not applicable.
        metric: `perplexity` or `accuracy`.
        value: the figure; None when status is `failed`.
        stderr: its standard error, in the units of `value`.
        interval_low, interval_high: 95 % interval.
        num_samples: scored tokens or trials.
        status: `ok`, `beyond_window` (longer than the model's own window: measured all the same, or
            not measurable) or `failed`.
        reason: why, unless `ok`.
        model: path or id of the model.
    """

    stage: Stage
    evaluation: str
    data: str
    context_length: int
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
