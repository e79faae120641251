"""A run directory: every file name of a run, and results as tidy rows."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from skipwise.errors import UserError
from skipwise.evaluation.results import EvalResult, result_key
from skipwise.utils.files import _damaged, append_line, read_lines, write_text

LOCK_SECONDS = 10.0
# Of two configurations, that are named.
MOST_DIFFERENCES = 8


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two resolved configurations say differently, in words, by key; keys that came later have their defaults."""
    from skipwise.config.files import parse_written, to_yaml

    flat = []
    for values in (one, other):
        with suppress(UserError):  # what cannot be read any more is compared as it is
            values = yaml.safe_load(to_yaml(parse_written(values)))
        flat.append(dict(_flat(values)))
    before, now = flat
    said: dict[str, str] = {}
    for key in dict.fromkeys((*before, *now)):
        was, new = (str(side[key]) if key in side else "not there" for side in (before, now))
        if was != new and not any(key.startswith(section) for section in said):
            section = key.removesuffix("name") if key.endswith(".name") else f"{key}["
            said[section] = f"{key} was {was} and is {new}"  # which says enough of what is in it
    return list(said.values())


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """`("train.max_steps", 300)` for every value; a list of sections is its names, then their values."""
    if isinstance(value, dict):
        for key, inner in sorted(value.items(), key=lambda item: item[0] != "name"):
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        yield name, [inner.get("name", inner.get("source")) for inner in value]
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    else:
        yield name, value


@dataclass(frozen=True)
class ExampleLog:
    """What was measured on each prompt or document, one file per evaluation; a line is there as soon as it is known."""

    path: Path

    def read(self, evaluation: str) -> list[dict[str, Any]]:
        """All examples of an evaluation, in the order they were added."""
        return read_lines(self._file(evaluation))

    def add(self, evaluation: str, example: Mapping[str, Any]) -> None:
        """Append one line, in place of one that was cut off."""
        append_line(self._file(evaluation), example)

    def _file(self, evaluation: str) -> Path:
        return self.path / f"{evaluation}.jsonl"


@dataclass(frozen=True)
class SharedFiles:
    """What is made once and read for every model of a run."""

    path: Path

    def read(self, name: str) -> list[dict[str, Any]] | None:
        """The lines of a file, or None if it is not there."""
        file = self.path / f"{name}.jsonl"
        return read_lines(file) if file.exists() else None

    def write(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write it, whole or not at all."""
        write_text(self.path / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class RunDir:
    """The files of one run, by name."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration as given."""
        return self.path / "config.yaml"

    @property
    def resolved(self) -> Path:
        """The configuration with every default filled in."""
        return self.path / "resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, command."""
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        """What was going to happen."""
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        """Sources, counts, and which documents were held out."""
        return self.path / "data.json"

    @property
    def train_log(self) -> Path:
        """One line per logged training step."""
        return self.path / "train.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The trainer's own checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The extended model."""
        return self.path / "model"

    @property
    def rope(self) -> Path:
        """The frequencies and the attention factor that the model was trained with."""
        return self.path / "rope.json"

    @property
    def results(self) -> Path:
        """One row per result."""
        return self.path / "results.jsonl"

    @property
    def table(self) -> Path:
        """Of an evaluation: the models side by side, as Markdown."""
        return self.path / "table.md"

    @property
    def models(self) -> Path:
        """Of an evaluation: what identifies each model."""
        return self.path / "models.json"

    def examples(self, model: str) -> ExampleLog:
        """What was measured on each prompt or document, for one model (or stage)."""
        return ExampleLog(self.path / "examples" / model)

    @property
    def shared(self) -> SharedFiles:
        """What is made once for all models."""
        return SharedFiles(self.path / "examples")

    @property
    def report(self) -> Path:
        """The page about it."""
        return self.path / "report.html"

    @property
    def parts(self) -> Path:
        """Which parts of the run are done."""
        return self.path / "parts.json"

    @property
    def timings(self) -> Path:
        """Seconds per part of the run."""
        return self.path / "timings.json"

    def claim(self, resume: bool, resolved: str) -> None:
        """Make the directory ours, or refuse.

        Args:
            resume: go on with a run that is there.
            resolved: the resolved configuration, which a resumed run must share.

        Raises:
            UserError: when something is there and `resume` is off, or it is another run.
        """
        if self.resolved.exists():
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already. Add --resume to go on with it, or choose another --output.",
                    code="run_exists",
                )
            from skipwise.config.files import read_yaml

            changed = _differences(read_yaml(self.resolved), yaml.safe_load(resolved))
            if changed:
                more = len(changed) - MOST_DIFFERENCES
                raise UserError(
                    f"{self.path} was started with another configuration: {'; '.join(changed[:MOST_DIFFERENCES])}"
                    f"{f'; and {more} more' if more > 0 else ''}. Resume with the same one, or "
                    "choose another --output.",
                    code="configuration_changed",
                )
        elif self.path.exists() and not self._only_begun():
            raise UserError(
                f"{self.path} exists and is no Skipwise run. Choose another --output.", code="output_kind_mismatch"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out; beside the directory, which may not be there yet.

        Raises:
            UserError: while another process holds it.
        """
        place = self.path.resolve()  # `.` has no name
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass  # where nothing can be written, a lock would be waited for
        try:
            # What a killed process had started may hold it for a few seconds more.
            with FileLock(place.with_name(f".{place.name}.lock"), timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise UserError(
                f"Another process is writing to {self.path}. Wait for it or stop it, or choose another --output.",
                code="locked_by_another_process",
            ) from error

    def _only_begun(self) -> bool:
        """Whether there is nothing but what a run writes first."""
        first = {file.name for file in (self.config, self.environment, self.plan, self.data, self.parts)}
        # What was being written when a process was killed is hidden.
        return (
            self.path.is_dir() and {path.name for path in self.path.iterdir() if not path.name.startswith(".")} <= first
        )

    def read_results(self) -> list[EvalResult]:
        """The rows measured so far; empty for a new run."""
        try:
            return [EvalResult(**line) for line in read_lines(self.results)]
        except TypeError as error:  # of other columns than rows have
            raise _damaged(self.results, str(error)) from error

    def add_results(self, rows: Iterable[EvalResult]) -> None:
        """Append rows, atomically; they take the place of rows that failed for the same result."""
        new = list(rows)
        keys = {_place(row) for row in new}
        old = [row for row in self.read_results() if row.status != "failed" or _place(row) not in keys]
        write_text(self.results, "".join(json.dumps(row.as_row(), allow_nan=False) + "\n" for row in [*old, *new]))

    def measured(self, stage: str, model: str) -> set[tuple[str, int | None]]:
        """(name of what is measured at once, context length) pairs that a model has rows of, and none that failed."""
        rows = [row for row in self.read_results() if (row.stage, row.model) == (stage, model)]
        failed = {result_key(row) for row in rows if row.status == "failed"}
        return {result_key(row) for row in rows} - failed


def _place(row: EvalResult) -> tuple[str, str, tuple[str, int | None]]:
    return row.stage, row.model, result_key(row)
