"""What an evaluation is made of: units that are measured at once, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipwise.evaluation.progress import ProgressCallback
from skipwise.evaluation.results import Stage
from skipwise.evaluation.statistics import Example, Result

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from skipwise.data.held_out import HeldOut

# (context length, identifier) of an example.
Key = tuple[int | None, str]


@dataclass(frozen=True)
class ModelUnderTest:
    """A model under evaluation.

    Attributes:
        stage: which state of it.
        name: path or id, for the rows.
        window: tokens it claims to handle; longer contexts are flagged. None if it does not say.
        dtype: compute dtype.
        chat: put prompts through the tokenizer's chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stage: Stage
    name: str
    window: int | None
    dtype: torch.dtype
    chat: bool = False


@dataclass(frozen=True)
class EvaluationContext:
    """What all models that are compared are measured with.

    Attributes:
        held_out: documents for perplexities and haystacks.
        seed: of prompts and of the choice of documents.
        shared: a directory for what is made once for all models (key tokens).
        say: told what is going on.
    """

    held_out: HeldOut
    seed: int
    shared: Shared
    log: ProgressCallback


class Shared(Protocol):
    """Files that several models read and one of them writes."""

    def read(self, name: str) -> list[Example] | None:
        """The lines of a file, or None if it is not there."""
        ...

    def write(self, name: str, lines: Sequence[Example]) -> None:
        """Write it, whole or not at all."""
        ...


@dataclass(frozen=True)
class Measurement:
    """A measurement that gives the rows of one or several context lengths.

    Attributes:
        name: of what is measured: the evaluation, or `suite/task` where a unit is one task of a suite.
        context_lengths: which; None for tasks that have no length of their own.
        data: what is measured on, for the rows.
        metric: of the row that says that it failed.
        size: how many examples there will be, at most; None if that is not known.
        measure: called with the keys of examples that are there already, and with the context lengths to measure;
            yields the other examples, in an order and with values that do not depend on which are there.
        results: from all examples of one length to the results of its rows; a result may name its `evaluation`.
    """

    name: str
    context_lengths: tuple[int | None, ...]
    data: str
    metric: str
    size: int | None
    measure: Callable[[set[Key], Sequence[int | None]], Iterator[Example]]
    results: Callable[[Sequence[Example]], list[Result]]
