"""What is said while something is measured: in a log now and then, with the time that is left."""

import io

from rich.console import Console
from rich.status import Status

from skipwise.evaluation.progress import ConsoleProgress, Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_counts_examples_tokens_and_what_is_left() -> None:
    clock, said = Clock(), []
    progress = Progress(lambda text, *, detail="", stay=False: said.append(detail), "passkey", 10, 4, clock)
    progress.read(2048, 8192)
    clock.now += 90
    progress.example()
    progress.read(8192, 8192)
    clock.now += 150
    progress.example()
    assert said == [
        ", 4 of 10 examples, 2,048 of 8,192 tokens of the next",
        ", 5 of 10 examples, about 8 min left",  # five more of 90 s
        ", 5 of 10 examples, about 8 min left",
        ", 6 of 10 examples, about 8 min left",  # four more of 120 s
    ]


def test_a_log_gets_a_line_when_something_begins_and_then_one_a_minute() -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, width=100)
    log = ConsoleProgress(console, Status("", console=console), clock)
    log("passkey at 8k")
    for minute in range(5):
        clock.now += 25
        log("passkey at 8k", detail=f", {minute} of 5 examples")
    log("perplexity at 8k", detail=", 0 of 2 examples")
    assert file.getvalue().splitlines() == ["passkey at 8k", "passkey at 8k, 2 of 5 examples", "perplexity at 8k"]
