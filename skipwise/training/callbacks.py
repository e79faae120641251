"""What a training run shows and records while it runs, and how it ends early."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipwise.models.memory import forget_peak_memory, peak_memory
from skipwise.utils.distributed import any_of
from skipwise.utils.files import append_line, read_lines, write_text

# Without a terminal a bar makes no sense; a line every so many seconds does.
SECONDS_BETWEEN_LINES = 15.0


class ProgressBar(TrainerCallback):
    """Steps, loss, tokens per second and time left: a bar on a terminal, plain lines elsewhere.

    Args:
        console: where to.
        tokens_per_step: over all ranks.
    """

    def __init__(self, console: Console, tokens_per_step: int) -> None:
        self.console, self.tokens_per_step = console, tokens_per_step
        self.loss: float | None = None  # nothing is logged yet
        self.first_step = 0
        self.started = self.last_line = 0.0
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock (a resumed run does not count the steps done before)."""
        self.first_step, self.started = state.global_step, time.monotonic()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, status="")
        self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Remember the loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        now = time.monotonic()
        speed = (state.global_step - self.first_step) * self.tokens_per_step / max(now - self.started, 1e-9)
        status = f"{speed:,.0f} tokens/s" + ("" if self.loss is None else f", loss {self.loss:.3f}")
        self.bar.update(self.task, completed=state.global_step, status=status)
        if not self.console.is_terminal and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (state.max_steps - state.global_step) * self.tokens_per_step / max(speed, 1e-9)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}, {status}, {left:.0f} s left", highlight=False
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last state on the screen, or in a log."""
        self.bar.stop()
        if not self.console.is_terminal:
            loss = "" if self.loss is None else f", loss {self.loss:.3f}"
            took = time.monotonic() - self.started
            self.console.print(f"step {state.global_step}/{state.max_steps}{loss}, {took:.0f} s", highlight=False)


class TrainLog(TrainerCallback):
    """Appends every log entry of the Trainer to `train.jsonl`, with speed and memory beside every loss.

    Args:
        path: of the file.
        tokens_per_step: over all ranks.
    """

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path, self.tokens_per_step = path, tokens_per_step
        self.step, self.when = 0, 0.0  # of the last entry

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what was logged after the checkpoint that training goes on from: it comes again."""
        self.step, self.when = state.global_step, time.monotonic()
        forget_peak_memory(args.device)
        if state.is_world_process_zero:
            lines = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the last step logged, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One line per entry, with its step."""
        if not (state.is_world_process_zero and logs):
            return
        entry: dict[str, Any] = {"step": state.global_step, **logs}
        if "loss" in logs:
            now, steps = time.monotonic(), state.global_step - self.step
            entry["tokens_per_second"] = round(steps * self.tokens_per_step / max(now - self.when, 1e-9), 1)
            entry["peak_memory"] = peak_memory(args.device)
            self.step, self.when = state.global_step, now
        self.when += logs.get("eval_runtime", 0.0)  # which is no training
        append_line(self.path, entry)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM save a checkpoint after the current step and end the training."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the signals over; a second SIGINT ends the process as usual."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if number == signal.SIGINT:  # launchers may send SIGTERM twice; who presses Ctrl-C twice means it
            signal.signal(number, self._previous.pop(number))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer to save and stop: all processes after the same step, whichever got the signal first."""
        if any_of(self.stopped, args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
