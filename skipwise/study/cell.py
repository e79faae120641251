"""One cell of a study: train it, measure it, and keep what the study needs of it in one small file."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from skipwise.config import ModelConfig, RunConfig, TrainConfig
from skipwise.config_files import parse_config, parse_evaluate_config, parse_section, to_yaml
from skipwise.environment import describe_environment
from skipwise.errors import UserError
from skipwise.evaluation.specs import EvalResult, Stage
from skipwise.runs import RunDir, read_json, read_lines, write_json
from skipwise.study.config import Cell, StudyConfig

# Lists of equal length: `example` (an identifier), and of perplexities `nll` and `tokens`, of all else `score`.
Units = dict[str, list[Any]]
# Settings of training that no figure depends on.
NO_MATTER = ("logging_steps", "save_steps", "save_total_limit", "dataloader_num_workers")


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

    def log(self, name: str) -> Path:
        """What a cell's process said."""
        return self.path / "logs" / f"{name}.txt"

    def work(self, name: str) -> Path:
        """Run and evaluations of a cell; only models that are kept are needed later."""
        return self.path / "work" / name


@dataclass(frozen=True)
class Finished:
    """What the tables need of a cell.

    Attributes:
        units: by domain and `evaluation/length`, what each document or prompt contributed.
        losses: (step, training loss).
        documents: by domain, digests of what was measured on.
        failed: by domain and `evaluation/length`, why there is no figure.
        trained: seconds of training.
        environment: machine and packages, without the command.
    """

    units: dict[str, dict[str, Units]]
    losses: list[tuple[int, float]]
    documents: dict[str, Any]
    failed: dict[str, dict[str, str]]
    trained: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)


def read_cell(directory: StudyDir, cell: Cell) -> Finished | None:
    """A finished cell; None if it is not there.

    Raises:
        UserError: when it was made with another configuration.
    """
    file = directory.cell(cell.name)
    if not file.exists():
        return None
    content = read_json(file)
    try:
        same = _same_setting(content["setting"], cell)
    except UserError:  # with a key that is no longer known
        same = False
    if not same:
        raise UserError(
            f"{file} was made with another configuration than the study has now. Bring that back, remove the file "
            "to measure it again, or choose another --output.",
            code="configuration_changed",
        )
    losses = [(step, loss) for step, loss in content["losses"]]
    trained = float(content["seconds"].get("train", 0.0))
    environment = {key: value for key, value in content["environment"].items() if key != "command"}
    return Finished(content["units"], losses, content["documents"], content["failed"], trained, environment)


def _setting(cell: Cell) -> dict[str, Any]:
    """All that the figures of a cell depend on."""
    aid = {} if cell.aid is None else {"aid": asdict(cell.aid)}
    return {
        **aid,
        "model": cell.model.model_dump(mode="json"),
        "run": None if cell.run is None else cell.run.model_dump(mode="json"),
        "domains": {name: domain.model_dump(mode="json") for name, domain in cell.domains.items()},
    }


def _same_setting(stored: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a stored setting means the same; keys that came later have their defaults."""
    run = None if stored["run"] is None else parse_config(stored["run"])
    domains = {name: parse_evaluate_config(values) for name, values in stored["domains"].items()}
    return (
        parse_section(ModelConfig, stored["model"]) == cell.model
        and stored.get("aid") == (None if cell.aid is None else asdict(cell.aid))
        and _what_matters(run) == _what_matters(cell.run)
        and domains == cell.domains
    )


def _what_matters(run: RunConfig | None) -> RunConfig | None:
    if run is None:
        return None
    defaults = {key: getattr(TrainConfig(), key) for key in NO_MATTER}
    return run.model_copy(update={"train": run.train.model_copy(update=defaults)})


def run_cell(study: StudyConfig, cell: Cell, directory: StudyDir, console: Console) -> None:
    """Train and measure a cell, unless it is there; goes on where it was interrupted.

    Raises:
        UserError: for input that is wrong, or while another process is at it.
        PreemptedError: when a signal stopped the training.
    """
    work = directory.work(cell.name)
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work.with_name(f".{cell.name}.lock"), timeout=0):
            if read_cell(directory, cell) is None:
                write_json(directory.cell(cell.name), _measured(cell, work, console), indent=None)
            if not study.keep_models:
                shutil.rmtree(work, ignore_errors=True)
    except Timeout as error:
        raise UserError(
            f"Another process is running {cell.name}. Wait for it, or run another cell.",
            code="locked_by_another_process",
        ) from error


def _measured(cell: Cell, work: Path, console: Console) -> dict[str, Any]:
    """The content of a cell's file."""
    from skipwise.comparison.compare import compare
    from skipwise.comparison.request import Compared
    from skipwise.extension import extend

    run = RunDir(work / "run")
    model = Compared(cell.name, cell.model.path, "original", cell.name, cell.model.revision, cell.aid)
    if cell.run is not None:
        extend(cell.run, run.path, given=to_yaml(cell.run), console=console, resume=True)
        stage: Stage = "interpolated" if cell.kind == "interpolate" else "extended"
        model = Compared(cell.name, str(run.model), stage, cell.name)
    outputs = {name: RunDir(work / "domains" / name) for name in cell.domains}
    rows: dict[str, list[EvalResult]] = {}
    for name, domain in cell.domains.items():
        console.rule(name)
        rows[name] = compare([model], domain, outputs[name].path, given=to_yaml(domain), console=console)
    log = read_lines(run.train_log)
    return {
        "method": cell.method,
        "scaling": cell.scaling,
        "budget": cell.budget,
        "seed": cell.seed,
        "learning_rate": None if cell.run is None else cell.run.train.learning_rate,
        "setting": _setting(cell),
        "environment": describe_environment(),
        "tokens": _tokens(run),
        "seconds": read_json(run.timings) if run.timings.exists() else {},
        "losses": [(line["step"], line["loss"]) for line in log if "loss" in line],
        "documents": {name: read_json(output.data) for name, output in outputs.items()},
        "failed": {
            name: {f"{row.evaluation}/{row.context_length}": row.reason for row in own if row.status == "failed"}
            for name, own in rows.items()
        },
        "rows": {
            name: [{**asdict(row), "data": name, "model": cell.name} for row in own] for name, own in rows.items()
        },
        "units": {name: _units(outputs[name], cell.name, own) for name, own in rows.items()},
    }


def _tokens(run: RunDir) -> int:
    if not run.plan.exists():
        return 0
    return int(read_json(run.plan)["train_tokens"])


def _units(run: RunDir, model: str, rows: list[EvalResult]) -> dict[str, Units]:
    """What each document or prompt contributed, by `evaluation/length` (of what has a figure)."""
    units: dict[str, Units] = {}
    rows = [row for row in rows if row.value is not None]
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
