"""A run directory: every file name of a run, and results as tidy rows."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.errors import UserError
from skipwise.evaluation.specs import EvalResult


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_text` of an indented JSON object."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
    def results(self) -> Path:
        """One row per figure."""
        return self.path / "results.jsonl"

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
                    f"{self.path} holds a run already. Add --resume to go on with it, or choose another --output."
                )
            if self.resolved.read_text(encoding="utf-8") != resolved:
                raise UserError(
                    f"{self.path} was started with another configuration (see {self.resolved}). "
                    "Resume with the same one, or choose another --output."
                )
        elif self.path.exists() and not self._only_begun():
            raise UserError(f"{self.path} exists and is no Skipwise run. Choose another --output.")

    def _only_begun(self) -> bool:
        """Whether there is nothing but what a run writes first."""
        first = {self.config.name, self.environment.name, self.plan.name, self.data.name}
        return self.path.is_dir() and {path.name for path in self.path.iterdir()} <= first

    def read_results(self) -> list[EvalResult]:
        """The rows measured so far; empty for a new run."""
        if not self.results.exists():
            return []
        lines = self.results.read_text(encoding="utf-8").splitlines()
        return [EvalResult(**json.loads(line)) for line in lines if line]

    def add_results(self, rows: Iterable[EvalResult]) -> None:
        """Append rows, atomically; they take the place of rows that failed for the same figure."""
        new = list(rows)
        figures = {(row.stage, row.evaluation, row.context_length) for row in new}
        old = [
            row
            for row in self.read_results()
            if row.status != "failed" or (row.stage, row.evaluation, row.context_length) not in figures
        ]
        write_text(self.results, "".join(json.dumps(row.as_row(), allow_nan=False) + "\n" for row in [*old, *new]))
