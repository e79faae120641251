"""One cell of a study: train it, measure it, and keep what the study needs of it in one small file."""

import gzip
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from skipwise.config.files import parse_evaluate_config, parse_section, parse_written, to_yaml
from skipwise.config.run import RunConfig
from skipwise.errors import UserError
from skipwise.evaluation.results import EvalResult, Stage
from skipwise.models.config import ModelConfig
from skipwise.runs.directory import RunDir
from skipwise.runs.environment import describe_environment
from skipwise.study.config import Cell, StudyConfig
from skipwise.training.config import TrainConfig
from skipwise.utils.files import read_json, read_lines, write_json

# Lists of equal length: `example` (an identifier), and of perplexities `nll` and `tokens`, of all else `score`.
Contributions = dict[str, list[Any]]
# Settings of training that no result depends on.
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
        """All results, computed from the cells."""
        return self.path / "summary.json"

    @property
    def table(self) -> Path:
        """The same as Markdown."""
        return self.path / "table.md"

    def cell(self, name: str) -> Path:
        """What is known of a finished cell."""
        return self.path / "cells" / f"{name}.json"

    @property
    def packed(self) -> Path:
        """Finished cells in one compressed file, a line each; a cell in a file of its own goes before it."""
        return self.path / "cells.jsonl.gz"

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
        documents: by domain, hashes of what was measured on.
        failed: by domain and `evaluation/length`, why there is no result.
        trained: seconds of training.
        environment: machine and packages, without the command.
    """

    contributions: dict[str, dict[str, Contributions]]
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
        file = directory.packed
    content = read_json(file) if file != directory.packed else _packed_cells(file).get(cell.name)
    if content is None:
        return None
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


def _packed_cells(file: Path) -> Mapping[str, dict[str, Any]]:
    """Cells of a compressed file, by name."""
    return _read_packed(file, file.stat().st_mtime_ns) if file.exists() else {}


@lru_cache(maxsize=4)
def _read_packed(file: Path, changed: int) -> dict[str, dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        cells = map(json.loads, lines)
        return {cell["name"]: cell for cell in cells}


def pack_cells(directory: StudyDir) -> int:
    """Put all finished cells into one compressed file, which is the same for the same cells; their number.

    What only a single cell's own file held, rows that follow from the units, is left out.
    """
    cells = dict(_packed_cells(directory.packed))
    files = sorted((directory.path / "cells").glob("*.json"))
    cells |= {file.stem: {"name": file.stem, **read_json(file)} for file in files}
    for cell in cells.values():
        cell.pop("rows", None)
    text = "".join(json.dumps(cells[name]) + "\n" for name in sorted(cells))
    temporary = directory.packed.with_name(f".{directory.packed.name}.tmp")
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(directory.packed)
    for file in files:
        file.unlink()
    return len(cells)


def _setting(cell: Cell) -> dict[str, Any]:
    """All that the results of a cell depend on."""
    training_free = {} if cell.training_free is None else {"aid": asdict(cell.training_free)}
    return {
        **training_free,
        "model": cell.model.model_dump(mode="json"),
        "run": None if cell.run is None else cell.run.model_dump(mode="json"),
        "domains": {name: domain.model_dump(mode="json") for name, domain in cell.domains.items()},
    }


def _same_setting(stored: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a stored setting means the same; keys that came later have their defaults."""
    run = None if stored["run"] is None else parse_written(stored["run"])
    domains = {name: parse_evaluate_config(values) for name, values in stored["domains"].items()}
    return (
        parse_section(ModelConfig, stored["model"]) == cell.model
        and stored.get("aid") == (None if cell.training_free is None else asdict(cell.training_free))
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
    from skipwise.workflows.evaluate import compare
    from skipwise.workflows.evaluation_arguments import ModelArgument
    from skipwise.workflows.extend import extend

    run = RunDir(work / "run")
    model = ModelArgument(cell.name, cell.model.path, "original", cell.name, cell.model.revision, cell.training_free)
    if cell.run is not None:
        extend(cell.run, run.path, given=to_yaml(cell.run), console=console, resume=True)
        stage: Stage = "interpolated" if cell.kind == "interpolate" else "extended"
        model = ModelArgument(cell.name, str(run.model), stage, cell.name)
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
        "units": {name: _contributions(outputs[name], cell.name, own) for name, own in rows.items()},
    }


def _tokens(run: RunDir) -> int:
    if not run.plan.exists():
        return 0
    return int(read_json(run.plan)["train_tokens"])


def _contributions(run: RunDir, model: str, rows: list[EvalResult]) -> dict[str, Contributions]:
    """What each document or prompt contributed, by `evaluation/length` (of what has a result)."""
    contributions: dict[str, Contributions] = {}
    rows = [row for row in rows if row.value is not None]
    for suite in dict.fromkeys(row.evaluation.partition("/")[0] for row in rows):
        for line in run.examples(model).read(suite):
            keys = ("nll", "tokens") if "nll" in line else ("score",)
            if not all(key in line for key in keys):
                continue
            name = "/".join([suite, *([line["task"]] if "task" in line else []), str(line["context_length"])])
            own = contributions.setdefault(name, {key: [] for key in ("example", *keys)})
            for key in own:
                own[key].append(_short(line[key]))
    return contributions


def _short(value: Any) -> Any:
    """A loss with all the digits that float32 has, and no more."""
    return float(f"{value:.9g}") if isinstance(value, float) else value
