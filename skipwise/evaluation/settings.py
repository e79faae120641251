"""What the settings of all evaluations share: types, rules, and what the rest of the program asks them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Strict

from skipwise.errors import UserError
from skipwise.utils.settings import Length

if TYPE_CHECKING:
    from skipwise.evaluation.measurement import EvaluationContext, Measurement, ModelUnderTest

DocumentIds = Annotated[tuple[str, ...], Strict(False)] | None
ContextLengths = Annotated[tuple[Length, ...], Strict(False)]


@dataclass(frozen=True)
class Traits:
    """What kind of evaluation it is, as far as others need to know.

    Attributes:
        metric: main metric, by its name in `metrics`.
        counted: setting that says how many examples there are.
        results_by: setting whose entries have results of their own.
        on_documents: whether held-out documents are scored, the same ones for all models.
        source: setting that names a source of records; None without one.
        other_model: setting that names a model besides the one under test; None without one.
        package: package that is needed besides; None without one.
        without_effect: settings that results do not depend on.
    """

    metric: str
    counted: str
    results_by: str = "context_lengths"
    on_documents: bool = False
    source: str | None = None
    other_model: str | None = None
    package: str | None = None
    without_effect: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Texts:
    """Texts of one length that a model reads.

    Attributes:
        length: in tokens.
        count: number of texts.
        share: part of each text that is read anew, where texts share their beginnings.
    """

    length: int
    count: int
    share: float = 1.0


class Evaluation(Protocol):
    """What an evaluation answers, besides its settings."""

    @property
    def name(self) -> str:
        """Name in a configuration."""
        ...

    @property
    def traits(self) -> Traits:
        """What kind of evaluation it is."""
        ...

    @property
    def context_lengths(self) -> Sequence[int | None]:
        """Context lengths, in tokens; None for tasks that have no length of their own."""
        ...

    def texts_read(self) -> Sequence[Texts] | None:
        """Texts that are read of one model where all documents are found; None where settings do not say it."""
        ...

    def measurements(self, tested: "ModelUnderTest", context: "EvaluationContext") -> "Iterator[Measurement]":
        """Measurements of one model, which give the rows of one or several context lengths each."""
        ...


class DocumentEvaluation(Evaluation, Protocol):
    """An evaluation on held-out documents."""

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Context lengths, in tokens."""
        ...

    @property
    def documents(self) -> int:
        """Number of documents."""
        ...

    @property
    def min_document_tokens(self) -> int | None:
        """Shortest document, in tokens; None for the largest context length that any document reaches."""
        ...

    @property
    def document_ids(self) -> tuple[str, ...] | None:
        """These documents and no others; None for a draw."""
        ...

    def with_documents(self, ids: tuple[str, ...], lengths: tuple[int, ...]) -> "DocumentEvaluation":
        """The same evaluation of these documents, which reach these lengths."""
        ...


def check_lengths(context_lengths: tuple[int, ...]) -> None:
    """Raise `UserError` unless these are different lengths of at least 2 tokens."""
    if not context_lengths or min(context_lengths) < 2 or len(set(context_lengths)) < len(context_lengths):
        raise UserError(
            f"context_lengths must be different lengths of at least 2 tokens, not {list(context_lengths)}. "
            "Give for example [4096, 32768].",
            code="wrong_context_lengths",
        )


def check_at_least_one(**counts: int | None) -> None:
    """Raise `UserError` for a count below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}.", code="count_below_one")
