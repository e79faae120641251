"""Several processes of one training, with gloo on a CPU, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "training" / "ranks_worker.py"


def launch(ranks: int, *command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command of Python under torchrun, or alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *launcher, *command], capture_output=True, text=True, env=environment, check=False, timeout=500
    )


def work(directory: Path, ranks: int, *stop: str) -> Path:
    directory.mkdir(exist_ok=True)
    done = launch(ranks, str(WORKER), str(directory), str(4 // ranks), *stop)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


def windows_of_steps(directory: Path, ranks: int) -> list[set[tuple[int, ...]]]:
    """What was drawn for each step, by all processes together (a process may draw ahead)."""
    drawn = [json.loads((directory / f"drawn-{rank}.json").read_text())["drawn"] for rank in range(ranks)]
    return [{tuple(visit) for batch in batches for visit in batch} for batches in zip(*drawn, strict=True)]


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "train.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work(tmp_path_factory.mktemp("alone"), 1)


def test_two_processes_train_like_one(tmp_path: Path, alone: Path) -> None:
    """The same windows in every step, the same losses, the same weights but for rounding."""
    two = work(tmp_path / "two", 2)
    assert windows_of_steps(two, 2) == windows_of_steps(alone, 1)
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)  # logged with four digits after the point
    weights = [torch.load(one / "weights.pt", weights_only=True) for one in (alone, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path, alone: Path) -> None:
    """They resume to the same end. Seen to hang when every process decided for itself."""
    two = work(tmp_path / "two", 2, "3")
    ends = [json.loads((two / f"drawn-{rank}.json").read_text())["finished"] for rank in (0, 1)]
    assert ends == [False, False]
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    work(two, 2)
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)


def test_a_whole_run_under_torchrun(tmp_path: Path) -> None:
    """One plan, one log, one model, and the other process's errors are told apart."""
    config: dict[str, Any] = {
        "model": {"path": "builtin:tiny"},
        "lengths": {"target": 512},
        "data": "builtin:python",
        "train": {"max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1, "kl_weight": 0.0},
        "evaluate": [{"name": "passkey", "context_lengths": [256], "trials": 2}],
        "stages": ["extended"],
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    output = tmp_path / "run"
    done = launch(2, "-m", "skipwise", "extend", str(file), "--output", str(output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Plan") == 1
    assert len(losses(output)) == 2
    assert json.loads((output / "plan.json").read_text())["train_tokens"] == 2 * 2 * 256
    again = launch(2, "-m", "skipwise", "extend", str(file), "--output", str(output))
    assert again.returncode != 0
    assert again.stderr.count("holds a run already") == 1
