"""Experiment trackers: training goes to them through the Trainer's own integrations, results through Accelerate's."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from skipwise.errors import UserError
from skipwise.training.config import Tracker

PROJECT = "skipwise"


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise `UserError` for a tracker that is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a directory of that name, as W&B leaves one
            raise UserError(
                f"train.report_to names {name}, which is not installed. Leave it out, or install it with: pip install "
                f"{name}",
                code="package_not_installed",
            )


@contextmanager
def tracker_places(run: Path) -> Iterator[None]:
    """Tell trackers where a run belongs, unless the environment does: a project, and files beside the others."""
    places = {
        "TENSORBOARD_LOGGING_DIR": str(run / "tensorboard"),
        "WANDB_PROJECT": PROJECT,
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
    }
    ours = {name: place for name, place in places.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
