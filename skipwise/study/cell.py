"""One cell of a study: train it, measure it, and keep what the study needs of it in one small file."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from skipwise.config_files import to_yaml
from skipwise.environment import describe_environment
from skipwise.errors import UserError
from skipwise.evaluation.specs import EvalResult
from skipwise.runs import RunDir, read_lines, write_json
from skipwise.study.config import Cell, StudyConfig, cell_yaml

# Lists of equal length: `example` (an identifier), and of perplexities `nll` and `tokens`, of all else `score`.
Units = dict[str, list[Any]]


@dataclass(frozen=True)
class StudyDir:
    """The files of a study, by name. `cells` and what is made from them is small; `work` can be large."""

    path: Path

    @property
    def config(self) -> Path:
        """The study as given."""
        return self.path / "study.yaml"

    @property
    def summary(self) -> Path:
        """All figures, computed from the cells."""
        return self.path / "summary.json"

    @property
    def table(self) -> Path:
        """The same as Markdown."""
        return self.path / "table.md"

    def cell(self, name: str) -> Path:
        """What is known of a finished cell."""
        return self.path / "cells" / f"{name}.json"

    def work(self, name: str) -> Path:
        """Run and evaluations of a cell; only models that are kept are needed later."""
        return self.path / "work" / name


@dataclass(frozen=True)
class Finished:
    """What a study keeps of a cell.

    Attributes:
        rows: by domain, its figures.
        units: by domain and `evaluation/length`, what each document or prompt contributed.
        losses: (step, training loss).
        tokens: trained on.
        seconds: by part of the run.
    """

    rows: dict[str, list[EvalResult]]
    units: dict[str, dict[str, Units]]
    losses: list[tuple[int, float]]
    tokens: int
    seconds: dict[str, float]


def read_cell(directory: StudyDir, cell: Cell) -> Finished | None:
    """A finished cell; None if it is not there.

    Raises:
        UserError: when it was made with another configuration.
    """
    file = directory.cell(cell.name)
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["digest"] != cell.digest:
        raise UserError(
            f"{file} was made with another configuration than the study has now. Bring that back, remove the file "
            "to measure it again, or choose another --output."
        )
    rows = {domain: [EvalResult(**row) for row in own] for domain, own in content["rows"].items()}
    losses = [(step, loss) for step, loss in content["losses"]]
    return Finished(rows, content["units"], losses, content["tokens"], content["seconds"])


def run_cell(study: StudyConfig, cell: Cell, directory: StudyDir, console: Console) -> None:
    """Train and measure a cell, unless it is there; goes on where it was interrupted.

    Raises:
        UserError: for input that is wrong, or an evaluation that failed.
        PreemptedError: when a signal stopped the training.
    """
    if read_cell(directory, cell) is not None:
        return
    from skipwise.comparison.compare import compare
    from skipwise.comparison.request import Compared
    from skipwise.extension import extend

    work = directory.work(cell.name)
    run = RunDir(work / "run")
    model = Compared(cell.name, str(study.base["model"]["path"]), "original", cell.name)
    if cell.run is not None:
        extend(cell.run, run.path, given=cell_yaml(cell), console=console, resume=True)
        stage = "interpolated" if cell.run.method == "interpolate" else "extended"
        model = Compared(cell.name, str(run.model), stage, cell.name)  # type: ignore[arg-type]
    rows: dict[str, list[EvalResult]] = {}
    units = {}
    for name, domain in cell.domains.items():
        console.rule(name)
        output = RunDir(work / name)
        rows[name] = compare([model], domain, output.path, given=to_yaml(domain), console=console)
        failed = next((row for row in rows[name] if row.status == "failed"), None)
        if failed is not None:
            raise UserError(f"{failed.evaluation} of {cell.name} on {name} failed: {failed.reason}")
        units[name] = _units(output, cell.name, rows[name])
    log = read_lines(run.train_log)
    content = {
        "method": cell.method,
        "scaling": cell.scaling,
        "budget": cell.budget,
        "seed": cell.seed,
        "learning_rate": None if cell.run is None else cell.run.train.learning_rate,
        "digest": cell.digest,
        "environment": describe_environment(),
        "tokens": _tokens(run),
        "seconds": json.loads(run.timings.read_text()) if run.timings.exists() else {},
        "losses": [(line["step"], line["loss"]) for line in log if "loss" in line],
        "rows": {name: [_named(row, name, cell) for row in own] for name, own in rows.items()},
        "units": units,
    }
    write_json(directory.cell(cell.name), content, indent=None)
    if not study.keep_models:
        shutil.rmtree(work)


def _named(row: EvalResult, domain: str, cell: Cell) -> dict[str, Any]:
    """A row without the paths of this machine."""
    return {**asdict(row), "data": domain, "model": cell.name}


def _tokens(run: RunDir) -> int:
    if not run.plan.exists():
        return 0
    plan: Mapping[str, Any] = json.loads(run.plan.read_text())
    return int(plan["train_tokens"])


def _units(run: RunDir, model: str, rows: list[EvalResult]) -> dict[str, Units]:
    """What each document or prompt contributed, by `evaluation/length`."""
    units: dict[str, Units] = {}
    for suite in dict.fromkeys(row.evaluation.partition("/")[0] for row in rows):
        for line in run.examples(model).read(suite):
            keys = ("nll", "tokens") if "nll" in line else ("score",)
            if not all(key in line for key in keys):
                continue
            name = "/".join([suite, *([line["task"]] if "task" in line else []), str(line["context_length"])])
            own = units.setdefault(name, {key: [] for key in ("example", *keys)})
            for key in own:
                own[key].append(_short(line[key]))
    return units


def _short(value: Any) -> Any:
    """A loss with all the digits that float32 has, and no more."""
    return float(f"{value:.9g}") if isinstance(value, float) else value
