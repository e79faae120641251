"""A study from file to results: development cells, learning rates, all other cells, one summary."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.shape import ModelShape
from skipwise.planning.costs import step_flops
from skipwise.planning.plan import step_of
from skipwise.runs.directory import RunDir
from skipwise.study.cell import Finished, StudyDir, read_cell, run_cell
from skipwise.study.config import (
    Cell,
    Choice,
    StudyConfig,
    development_cells,
    final_cells,
    inspected,
    lengths_of,
    parse_study,
    resolved,
    tokens_of_step,
)
from skipwise.study.summary import choose_rates, mean_losses, summarise
from skipwise.utils.files import write_json, write_text

Done = list[tuple[Cell, Finished]]


@dataclass(frozen=True)
class Study:
    """A study file with its directory."""

    file: Path
    config: StudyConfig
    lengths: Lengths
    directory: StudyDir

    def finished(self, cells: Sequence[Cell]) -> Done:
        """Those of the cells that are there."""
        read = [(cell, read_cell(self.directory, cell)) for cell in cells]
        return [(cell, own) for cell, own in read if own is not None]

    def rates(self) -> list[dict[str, Any]]:
        """The chosen learning rate of each method whose development is finished."""
        if self.config.development is None:
            return []
        cells = list(development_cells(self.config))
        done = self.finished(cells)
        there = {cell.name for cell, _ in done}
        unfinished = {_choice(cell) for cell in cells if cell.name not in there}
        whole = [(cell, own) for cell, own in done if _choice(cell) not in unfinished]
        return choose_rates(self.config.development, whole, self.lengths.target)

    def cells(self) -> list[Cell]:
        """What can be run now: development, and what is reported of methods whose development is finished."""
        return [*development_cells(self.config), *self.final_cells(self.rates())]

    def final_cells(self, rates: Sequence[Mapping[str, Any]]) -> list[Cell]:
        """Of methods with a rate, and of those that need none."""
        chosen = _chosen(rates)
        undecided = {_choice(cell) for cell in development_cells(self.config)} - set(chosen)
        return [cell for cell in final_cells(self.config, chosen) if _choice(cell) not in undecided]


def _choice(cell: Cell) -> Choice:
    return cell.method, cell.scaling, cell.budget


def _chosen(rates: Sequence[Mapping[str, Any]]) -> dict[Choice, float]:
    return {(row["method"], row["scaling"], row["budget"]): row["learning_rate"] for row in rates}


def open_study(file: Path, output: Path, written: bool = False) -> Study:
    """Check a study file and where its cells are kept.

    Args:
        file: study file.
        output: study directory.
        written: whether an earlier version may have run it, and nothing is to be run now.

    Raises:
        UserError: for a file that is wrong, or a directory that holds something else.
    """
    config = parse_study(file, written)
    directory = StudyDir(output)
    # Other processes of the same study may have begun; their temporary files are hidden.
    strange = output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())
    if (output.exists() and not output.is_dir()) or (strange and not directory.config.exists()):
        raise UserError(f"{output} exists and is no study. Choose another --output.", code="output_kind_mismatch")
    return Study(file, config, lengths_of(config), directory)


def check_sources(study: Study) -> None:
    """Find what is not there before anything is trained; tables of finished cells need no data.

    Raises:
        UserError: for data or packages that are missing.
    """
    from skipwise.data.sources import check_source
    from skipwise.workflows.evaluate import check_early

    for domain in study.config.domains.values():
        check_early(domain, RunDir(study.directory.path / "nowhere"))
    cells = final_cells(study.config, {})
    for source in {source for cell in cells if cell.run is not None for source in cell.run.data.sources}:
        check_source(source)


def run_one(study: Study, name: str, console: Console) -> None:
    """One cell, in this process.

    Raises:
        UserError: for a cell that does not exist, or not before development is finished.
    """
    cell = next((cell for cell in study.cells() if cell.name == name), None)
    if cell is None:
        raise UserError(
            f"There is no cell {name!r} to be run now. --print-commands lists them; what is reported of a method comes "
            "after its development.",
            code="unknown_cell",
        )
    write_text(study.directory.config, study.file.read_text(encoding="utf-8"))
    run_cell(study.config, cell, study.directory, console)


def run_study(study: Study, jobs: int, console: Console) -> None:
    """All cells, `jobs` at a time, each in a process of its own.

    Raises:
        UserError: when cells failed; all others that can be run are finished first.
        KeyboardInterrupt: when the user stopped it; the same call goes on.
    """
    write_text(study.directory.config, study.file.read_text(encoding="utf-8"))
    for _ in range(2):  # development, then all that needed it
        cells = study.cells()
        _run_all(study, [cell for cell in cells if read_cell(study.directory, cell) is None], jobs, console)


Losses = dict[str, list[tuple[int, float]]]


def write_summary(study: Study) -> tuple[dict[str, Any], Losses, list[dict[str, Any]]]:
    """Write the summary of the cells that are there.

    Returns:
        It; by arm the mean training loss by step; the different environments in which the cells were measured.
    """
    rates = study.rates()
    done = study.finished(study.final_cells(rates))
    summary = summarise(study.config, study.lengths, done, rates)
    write_json(study.directory.summary, summary)
    environments = {json.dumps(own.environment, sort_keys=True): own.environment for _, own in done}
    return summary, mean_losses(done), list(environments.values())


def command_of(study: Study, cell: Cell) -> list[str]:
    """The arguments after `skipwise` that run one cell."""
    return ["study", str(study.file), "--output", str(study.directory.path), "--cell", cell.name]


def print_commands(study: Study) -> Iterator[str]:
    """A line for each cell that can be run now and is not there yet."""
    for cell in study.cells():
        if read_cell(study.directory, cell) is None:
            yield shlex.join(["skipwise", *command_of(study, cell)])


def _run_all(study: Study, cells: list[Cell], jobs: int, console: Console) -> None:
    """Run cells in processes of their own; a failed one does not stop the others."""
    waiting, running, failed = list(cells), dict[int, tuple[Cell, subprocess.Popen[bytes], float]](), []
    finished, started = 0, time.monotonic()
    with _stopped_by_signals():
        try:
            while waiting or running:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        cell = waiting.pop(0)
                        console.print(f"{cell.name}: started", highlight=False)
                        running[slot] = cell, _start(study, cell, slot, jobs), time.monotonic()
                time.sleep(0.2)
                for slot, (cell, process, since) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    finished += 1
                    left = (time.monotonic() - started) / finished * (len(cells) - finished)
                    console.print(
                        f"{cell.name}: {_outcome(process.returncode)} after {time.monotonic() - since:,.0f} s; "
                        f"{finished} of {len(cells)}, about {left / 60:,.0f} min left",
                        highlight=False,
                    )
                    if process.returncode:
                        failed.append(cell.name)
        finally:
            for _, process, _ in running.values():
                process.send_signal(signal.SIGINT)  # a training saves, and ends
            for _, process, _ in running.values():
                process.wait()
    if failed:
        log = study.directory.log(failed[0])
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["nothing was logged"]
        raise UserError(
            f"{len(failed)} of {len(cells)} cells failed ({', '.join(failed)}); the others are finished. The log of "
            f"the first, {log}, ends: {last[0]}",
            code="cells_failed",
        )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A request to terminate is like Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _outcome(code: int) -> str:
    return {0: "finished", 75: "stopped, and saved"}.get(code, f"failed (exit code {code})")


def _start(study: Study, cell: Cell, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    """A cell's process, with its share of the cores, and an accelerator of its own where there are several."""
    import torch

    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    log = study.directory.log(cell.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as opened:
        return subprocess.Popen(
            [sys.executable, "-m", "skipwise", *command_of(study, cell)],
            env=environment,
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is passed on once, by us
        )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cost_rows(study: Study) -> list[list[str]]:
    """For each method: cells; of these finished, and their training time; steps, tokens and FLOPs of all."""
    development = list(development_cells(study.config))
    final = list(final_cells(study.config, _chosen(study.rates())))
    shape = inspected(final[0].model).shape
    groups: dict[tuple[str, str], list[Cell]] = {}
    for part, cells in (("development", development), ("reported", final)):
        for cell in cells:
            groups.setdefault((part, f"{cell.method}{f', {cell.scaling}' if cell.scaling else ''}"), []).append(cell)
    rows, totals = [], [0.0] * 6
    for (part, name), cells in groups.items():
        costs = [_cost(cell, shape) for cell in cells]
        done = study.finished(cells)
        trained = sum(own.trained for _, own in done)
        row = [len(cells), len(done), trained, *(sum(cost[i] for cost in costs) for i in range(3))]
        totals = [total + own for total, own in zip(totals, row, strict=True)]
        rows.append([f"{part}: {name}", *_shown(row)])
    return [*rows, ["all", *_shown(totals)]]


def _shown(row: Sequence[float]) -> list[str]:
    """In the units of the table."""
    cells, finished, seconds, steps, tokens, flops = row
    return [
        f"{cells:,.0f}",
        f"{finished:,.0f}",
        f"{seconds / 3600:.1f} h",
        f"{steps:,.0f}",
        f"{tokens:,.0f}",
        "not known" if math.isnan(flops) else f"{flops:.2g}",
    ]


def _cost(cell: Cell, shape: ModelShape | None) -> tuple[int, int, float]:
    """Steps, tokens and FLOPs of a cell's training; no number for the FLOPs of a model whose cost is not known."""
    if cell.run is None or not cell.run.trains:
        return 0, 0, 0.0
    run, steps = resolved(cell.run), cell.run.train.max_steps
    step = step_of(run.train, run.window_length, bool(run.train.kl_weight))
    flops = math.nan if shape is None else steps * step_flops(shape, step).total
    return steps, steps * tokens_of_step(cell.run), flops
