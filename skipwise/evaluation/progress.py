"""Progress of an evaluation, in a terminal and in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

# In a log.
SECONDS_BETWEEN_LINES = 60


class ProgressCallback(Protocol):
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
class ConsoleProgress:
    """Tells in the status line of a terminal, or line by line in a log."""

    console: Console
    status: Status
    clock: Callable[[], float] = time.monotonic
    said: str = ""
    said_at: float = 0.0

    def __call__(self, text: str, *, detail: str = "", stay: bool = False) -> None:
        """See `ProgressCallback`."""
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

    log: ProgressCallback
    what: str
    total: int | None
    finished: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.before, self.started = self.finished, self.clock()

    def read(self, tokens: int, of: int) -> None:
        """So many tokens of a text were read."""
        self._report(f", {tokens:,} of {of:,} tokens of the next" if tokens < of else "")

    def example(self) -> None:
        """One more example is there."""
        self.finished += 1
        self._report("")

    def _report(self, more: str) -> None:
        of, left = "", ""
        if self.total is not None:
            of = f" of {self.total:,}"
            if self.finished > self.before:
                pace = (self.clock() - self.started) / (self.finished - self.before)
                seconds = pace * (self.total - self.finished)
                left = f", about {seconds:,.0f} s left" if seconds < 120 else f", about {seconds / 60:,.0f} min left"
        self.log(self.what, detail=f", {self.finished:,}{of} examples{more}{left}")
