"""Experiment trackers: training goes to them through the Trainer's own integrations, results through Accelerate's."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skipwise.config import Tracker
from skipwise.errors import UserError
from skipwise.evaluation.specs import EvalResult

PROJECT = "skipwise"


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise `UserError` for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.report_to names {name}, which is not installed. Leave it out, or install it with: pip install "
                f"{name}"
            )


def tensorboard_directory(run: Path) -> Path:
    """Where TensorBoard's files are: in the run directory, unless TENSORBOARD_LOGGING_DIR says otherwise."""
    return Path(os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run / "tensorboard")))


def send_results(names: Sequence[Tracker], run: Path, rows: Sequence[EvalResult]) -> None:
    """Send the figures of all stages, as a tracker's run of their own, whose steps are context lengths.

    Args:
        names: of trackers.
        run: the directory, by whose name the run is called.
        rows: of `results.jsonl`; those of single depths and those without a value are left out.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # for which trackers look
    called = f"{run.name}-results"
    settings: dict[Tracker, dict[str, Any]] = {
        "tensorboard": {"run_name": called, "logging_dir": tensorboard_directory(run)},
        "wandb": {"run_name": PROJECT, "name": called, "reinit": "finish_previous"},
        "mlflow": {"experiment_name": PROJECT, "run_name": called},
        "trackio": {"run_name": PROJECT, "name": called},
    }
    figures: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.depth is None and row.value is not None and row.context_length is not None:
            figures.setdefault(row.context_length, {})[f"{row.stage}/{row.evaluation}"] = row.value
    for name in names:
        if name == "mlflow":
            import mlflow

            mlflow.end_run()  # that of the training
        tracker = LOGGER_TYPE_TO_CLASS[name](**settings[name])
        tracker.start()
        for length, values in sorted(figures.items()):
            tracker.log(values, step=length)
        tracker.finish()
