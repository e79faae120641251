"""`skipwise study`, end to end."""

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from skipwise import UserError
from skipwise.study import run as study_run
from skipwise.study.cell import StudyDir, pack_cells
from skipwise.study.config import Cell
from skipwise.study.run import Study, check_sources, open_study, run_one, write_summary
from tests.commands import error_code, skipwise
from tests.processes import Fork, command, started


@pytest.fixture
def study_file(tmp_path: Path, pico_directory: Path, text_file: Path) -> Path:
    evaluate = [
        {"name": "perplexity", "context_lengths": [64, 256], "stride": 32, "documents": 2, "final_tokens": 32},
        {"name": "passkey", "context_lengths": [256], "trials": 2},
    ]
    data = {"source": str(text_file), "held_out_share": 0.3}
    domain = {"data": data, "dtype": "float32", "evaluate": evaluate}
    values = {
        "base": {
            "model": {"path": str(pico_directory), "dtype": "float32"},
            "lengths": {"target": 256},
            "data": {"source": str(text_file), "held_out_share": 0.3},
            "train": {"max_steps": 4, "per_device_train_batch_size": 1, "save_steps": 2},
        },
        "methods": {"untouched": "untouched", "pose": "pose", "full": "full"},
        "seeds": [1],
        "equal": ["tokens"],
        "development": {"learning_rates": [1e-3, 1e-2], "domains": ["dev"]},
        "domains": {"dev": domain, "test": {**domain, "seed": 1}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def forked_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are processes still, but with nothing left to import."""

    def start(study: Study, cell: Cell, *_: int) -> Fork:
        log = study.directory.log(cell.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        return Fork(study_run.command_of(study, cell), log)

    monkeypatch.setattr(study_run, "_start", start)


@pytest.mark.usefixtures("forked_cells")
def test_a_study_from_file_to_figures(study_file: Path, tmp_path: Path) -> None:
    """Development first, then the rest with what it chose; a cell is one command; a finished one is not run again."""
    output = tmp_path / "out"
    costs = skipwise("study", study_file, "--output", output, "--dry-run")
    assert "development: full" in costs and "reported: pose" in costs
    assert not output.exists()
    elsewhere = tmp_path / "elsewhere.yaml"  # what it costs and what is to be run needs no texts
    elsewhere.write_text(study_file.read_text().replace("text.jsonl", "nowhere.jsonl"))
    assert error_code(skipwise("study", elsewhere, "--output", output, code=2)) == "data_not_found"
    for option in ("--dry-run", "--print-commands"):
        skipwise("study", elsewhere, "--output", output, option)
    commands = skipwise("study", study_file, "--output", output, "--print-commands").splitlines()
    names = [shlex.split(line)[-1] for line in commands]
    assert len(names) == 4 + 1 and names[-1] == "untouched"  # which needs no development
    study = open_study(study_file, output)
    console = Console(quiet=True)
    for name in names[1:4]:
        run_one(study, name, console)
    # All of pose's development is there, so it goes on beside what is left of the other's.
    assert names[0].startswith("development-full")
    whole = skipwise("study", study_file, "--output", output, "--jobs", 2)
    assert "3 of 3" in whole and "1 of 1" in whole
    cells = {path.stem: json.loads(path.read_text()) for path in (output / "cells").glob("*.json")}
    assert len(cells) == 4 + 3
    summary = json.loads((output / "summary.json").read_text())
    rates = {row["method"]: row["learning_rate"] for row in summary["learning_rates"]}
    tried = {
        rate: cells[f"development-pose-rate{rate:g}-seed0"]["units"]["dev"]["perplexity/256"]["nll"]
        for rate in (1e-3, 1e-2)
    }
    assert rates["pose"] == min(tried, key=lambda rate: sum(tried[rate]))
    assert cells["pose-seed1"]["learning_rate"] == rates["pose"]
    assert cells["pose-seed1"]["tokens"] == 4 * 64
    assert cells["full-tokens-seed1"]["tokens"] == 256  # one step
    assert {row["method"] for row in summary["figures"]} == {"untouched", "pose", "full"}
    assert str(tmp_path) not in json.dumps([cell["units"] for cell in cells.values()])
    assert "| pose |" in (output / "table.md").read_text()
    assert (output / "plots" / "perplexity.svg").exists()
    assert cells["pose-seed1"]["environment"]["packages"]["torch"] in (output / "report.html").read_text()
    assert not list((output / "work").rglob("*.safetensors"))
    assert "perplexity at 256" in (output / "logs" / "pose-seed1.txt").read_text()
    # What is finished needs neither its work nor its model.
    shutil.rmtree(output / "work")
    again = skipwise("study", study_file, "--output", output)
    assert "started" not in again
    assert json.loads((output / "summary.json").read_text()) == summary
    # One compressed file holds all that the tables need, and is the same for the same cells.
    assert pack_cells(StudyDir(output)) == len(cells) and not list((output / "cells").iterdir())
    packed = (output / "cells.jsonl.gz").read_bytes()
    assert pack_cells(StudyDir(output)) == len(cells) and (output / "cells.jsonl.gz").read_bytes() == packed
    assert "started" not in skipwise("study", study_file, "--output", output)
    assert json.loads((output / "summary.json").read_text()) == summary
    (output / "cells" / "pose-seed1.json").write_text(json.dumps(cells["pose-seed1"] | {"seconds": {"train": 7200.0}}))
    costs = skipwise("study", study_file, "--output", output, "--dry-run").splitlines()
    assert "2.0 h" in next(line for line in costs if "reported: pose" in line)


def test_aids_are_methods(study_file: Path, tmp_path: Path) -> None:
    """The untouched model as it is, and reading with a training-free method: no training, and other results."""
    values = yaml.safe_load(study_file.read_text())
    values["methods"] = {"untouched": "untouched", "grouped": "untouched+self-extend:4"}
    del values["development"], values["domains"]["dev"]
    study_file.write_text(yaml.safe_dump({**values, "reference": "untouched"}))
    skipwise("study", study_file, "--output", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "summary.json").read_text())["figures"]
    found = {(row["arm"], row["evaluation"], row["context_length"]): row["value"] for row in results}
    assert found["grouped", "perplexity", 256] != found["untouched", "perplexity", 256]
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_interrupted_cell_goes_on(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results as without."""
    import skipwise.workflows.evaluate as compare_module

    names = "development-pose-rate0.01-seed0"
    study_file.write_text(study_file.read_text() + "keep_models: true\n")
    whole = open_study(study_file, tmp_path / "whole")
    run_one(whole, names, Console(quiet=True))
    halved = open_study(study_file, tmp_path / "halved")
    real, measured = compare_module._measure, []

    def stop(*arguments: Any) -> None:
        measured.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run_one(halved, names, Console(quiet=True))
    assert len(measured) == 1
    model = halved.directory.work(names) / "run" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    monkeypatch.setattr(compare_module, "_measure", real)
    run_one(halved, names, Console(quiet=True))
    assert model.stat().st_mtime_ns == written  # not trained twice
    both = [json.loads(one.directory.cell(names).read_text()) for one in (whole, halved)]
    assert both[0]["units"] == both[1]["units"]
    assert both[0]["losses"] == both[1]["losses"]


def test_what_is_refused(study_file: Path, tmp_path: Path) -> None:
    study = open_study(study_file, tmp_path / "out")
    with pytest.raises(UserError, match="no cell 'pose-seed1' to be run now"):
        run_one(study, "pose-seed1", Console(quiet=True))
    values = yaml.safe_load(study_file.read_text())
    values["domains"]["test"]["data"] = str(tmp_path / "none.jsonl")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        check_sources(open_study(tmp_path / "wrong.yaml", tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="is no study"):
        open_study(study_file, tmp_path / "other")
    run_one(study, "development-pose-rate0.01-seed0", Console(quiet=True))
    changed = yaml.safe_load(study_file.read_text())
    changed["base"]["train"]["max_steps"] = 5
    study_file.write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match="made with another configuration"):
        write_summary(open_study(study_file, tmp_path / "out"))


@pytest.mark.usefixtures("forked_cells")
def test_a_failed_cell_does_not_stop_the_others(study_file: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(study_file.read_text())
    values["development"] = None
    values["methods"]["broken"] = {"data": {"min_document_tokens": 100_000}}
    values["methods"].pop("full")
    study_file.write_text(yaml.safe_dump(values))
    output = skipwise("study", study_file, "--output", tmp_path / "out", "--jobs", 2, code=2)
    assert "1 of 3 cells failed (broken-seed1); the others are finished" in output
    assert "needs documents of at least 100,000 tokens" in output
    assert {path.stem for path in (tmp_path / "out" / "cells").glob("*.json")} == {"untouched", "pose-seed1"}
    # Of what is there the tables are made all the same.
    assert "| pose |" in (tmp_path / "out" / "table.md").read_text()
    assert "| pose |" in skipwise("study", study_file, "--output", tmp_path / "out", "--summary")


def test_two_processes_do_not_run_the_same_cell(study_file: Path, tmp_path: Path) -> None:
    study = open_study(study_file, tmp_path / "out")
    name = "development-pose-rate0.01-seed0"
    study.directory.work(name).parent.mkdir(parents=True)
    with (
        FileLock(study.directory.work(name).with_name(f".{name}.lock")),
        pytest.raises(UserError, match=f"Another process is running {name}"),
    ):
        run_one(study, name, Console(quiet=True))


def test_a_figure_that_fails_is_told_and_does_not_stop_the_study(study_file: Path, tmp_path: Path) -> None:
    """A model whose frequencies depend on the length cannot be measured at two lengths in one pass."""
    values = yaml.safe_load(study_file.read_text())
    values["development"] = None
    values["methods"] = {"pose": "pose", "mixed": {"rope": "mixed"}}
    truncated = {"name": "truncated_perplexity", "context_lengths": [64, 256], "documents": 2}
    values["domains"]["test"]["evaluate"] = [truncated]
    del values["domains"]["dev"]
    study_file.write_text(yaml.safe_dump(values))
    study = open_study(study_file, tmp_path / "out")
    for name in ("pose-seed1", "mixed-seed1"):
        run_one(study, name, Console(quiet=True))
    summary, *_ = write_summary(study)
    assert {row["method"] for row in summary["figures"]} == {"pose"}
    assert {(one["cell"], one["figure"]) for one in summary["failed"]} == {
        ("mixed-seed1", "truncated_perplexity/64"),
        ("mixed-seed1", "truncated_perplexity/256"),
    }


def test_a_signal_stops_the_cells_too(study_file: Path, tmp_path: Path) -> None:
    """They save, and the same command goes on."""
    values = yaml.safe_load(study_file.read_text())
    values["base"]["train"]["max_steps"] = 5000
    study_file.write_text(yaml.safe_dump(values))
    work, words = tmp_path / "out" / "work", ["study", str(study_file), "--output", str(tmp_path / "out")]
    with started(command, [*words, "--jobs", "2"], tmp_path / "said") as study:
        study.wait_until(lambda: any(work.glob("*/run/train.jsonl")))
        study.signal(signal.SIGTERM)
        assert study.wait() == 130, study.printed
    assert list(work.glob("*/run/checkpoints/checkpoint-*/trainer_state.json"))
