"""What an evaluation is made of: units that are measured at once, and what they need."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import Console
from rich.status import Status
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.data.held_out import HeldOut
from skipwise.evaluation.figures import Example, Figure
from skipwise.evaluation.specs import Stage

# In a log.
SECONDS_BETWEEN_LINES = 60
# (context length, identifier) of an example.
Key = tuple[int | None, str]


class Say(Protocol):
    """Tells what is going on."""

    def __call__(self, text: str, *, detail: str = "", stay: bool = False) -> None:
        """Tell it.

        Args:
            text: what is going on; in a log it appears once.
            detail: how far it has come; it changes often, and in a log it appears now and then.
            stay: for what must not be overwritten by the next.
        """
        ...


@dataclass
class ConsoleSay:
    """Tells in the status line of a terminal, or line by line in a log."""

    console: Console
    status: Status
    clock: Callable[[], float] = time.monotonic
    said: str = ""
    said_at: float = 0.0

    def __call__(self, text: str, *, detail: str = "", stay: bool = False) -> None:
        """See `Say`."""
        self.status.update(Text(text + detail))
        new = text != self.said
        late = bool(detail) and self.clock() - self.said_at >= SECONDS_BETWEEN_LINES
        if stay or (not self.console.is_terminal and (new or late)):
            self.console.print(text if new else text + detail, markup=False, highlight=False, soft_wrap=True)
            self.said_at = self.clock()
        self.said = text


@dataclass
class Progress:
    """Tells how far a measurement has come: examples, tokens of the one that is being read, and the time left.

    Attributes:
        what: is measured.
        total: of the examples, if it is known.
        finished: examples that are there, some of them perhaps from before.
    """

    say: Say
    what: str
    total: int | None
    finished: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.before, self.started = self.finished, self.clock()

    def read(self, tokens: int, of: int) -> None:
        """So many tokens of a text were read."""
        self._tell(f", {tokens:,} of {of:,} tokens of the next" if tokens < of else "")

    def example(self) -> None:
        """One more example is there."""
        self.finished += 1
        self._tell("")

    def _tell(self, more: str) -> None:
        of, left = "", ""
        if self.total is not None:
            of = f" of {self.total:,}"
            if self.finished > self.before:
                pace = (self.clock() - self.started) / (self.finished - self.before)
                seconds = pace * (self.total - self.finished)
                left = f", about {seconds:,.0f} s left" if seconds < 120 else f", about {seconds / 60:,.0f} min left"
        self.say(self.what, detail=f", {self.finished:,}{of} examples{more}{left}")


@dataclass(frozen=True)
class Subject:
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
class Setting:
    """What all models that are compared are measured with.

    Attributes:
        held_out: documents for perplexities and haystacks.
        seed: of prompts and of the choice of documents.
        shared: a directory for what is made once for all models (key tokens).
        say: told what is going on.
    """

    held_out: HeldOut
    seed: int
    shared: "Shared"
    say: Say


class Shared(Protocol):
    """Files that several models read and one of them writes."""

    def read(self, name: str) -> list[Example] | None:
        """The lines of a file, or None if it is not there."""
        ...

    def write(self, name: str, lines: Sequence[Example]) -> None:
        """Write it, whole or not at all."""
        ...


@dataclass(frozen=True)
class Unit:
    """A measurement that gives the rows of one or several context lengths.

    Attributes:
        name: of what is measured: the evaluation, or `suite/task` where a unit is one task of a suite.
        context_lengths: which; None for tasks that have no length of their own.
        data: what is measured on, for the rows.
        metric: of the row that says that it failed.
        size: how many examples there will be, at most; None if that is not known.
        measure: called with the keys of examples that are there already, and with the context lengths to measure;
            yields the other examples, in an order and with values that do not depend on which are there.
        figures: from all examples of one length to the figures of its rows; a figure may name its `evaluation`.
    """

    name: str
    context_lengths: tuple[int | None, ...]
    data: str
    metric: str
    size: int | None
    measure: Callable[[set[Key], Sequence[int | None]], Iterator[Example]]
    figures: Callable[[Sequence[Example]], list[Figure]]
