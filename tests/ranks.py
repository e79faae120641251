"""Trainings in several processes, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.processes import ranks
from tests.training import ranks_worker


def work(directory: Path, count: int, *options: str) -> Path:
    """A training in so many processes, 4 windows a step in all."""
    directory.mkdir(exist_ok=True)
    with ranks(
        count, ranks_worker.run, [str(directory), str(4 // count), *options], directory / "printed"
    ) as all_ranks:
        assert [one.wait() for one in all_ranks] == [0] * count, "\n".join(one.printed[-4000:] for one in all_ranks)
    return directory


def report(directory: Path, rank: int) -> Any:
    return json.loads((directory / f"drawn-{rank}.json").read_text())


def windows_of_steps(directory: Path, ranks: int) -> list[set[tuple[int, ...]]]:
    """What was drawn for each step, by all processes together (a process may draw ahead)."""
    drawn = [report(directory, rank)["drawn"] for rank in range(ranks)]
    return [{tuple(visit) for batch in batches for visit in batch} for batches in zip(*drawn, strict=True)]


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "train.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def extension(directory: Path, **train: Any) -> Path:
    """The file of a short one."""
    config: dict[str, Any] = {
        "model": {"path": "builtin:tiny"},
        "lengths": {"target": 512},
        "data": "builtin:python",
        "train": {"max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1, "kl_weight": 0.0, **train},
        "evaluate": [{"name": "passkey", "context_lengths": [256], "trials": 2}],
        "stages": ["extended"],
    }
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
