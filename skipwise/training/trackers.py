"""Experiment trackers: training goes to them through the Trainer's own integrations, results through Accelerate's."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skipwise.config import Tracker
from skipwise.errors import UserError
from skipwise.evaluation.specs import EvalResult
from skipwise.runs import write_json

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


def send_results(
    names: Sequence[Tracker], run: Path, rows: Sequence[EvalResult], say: Callable[[str], None] = print
) -> None:
    """Send the figures of all stages, as a tracker's run of their own, whose steps are context lengths.

    What was sent already is not sent again; a tracker that fails is said and fails nothing else.

    Args:
        names: of trackers.
        run: the directory, by whose name the run is called.
        rows: of `results.jsonl`; those of single depths and those without a value are left out.
        say: told of failures.
    """
    figures: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.depth is None and row.value is not None:
            name = f"{row.stage}/{row.evaluation}/{row.metric}"
            figures.setdefault(row.context_length or 0, {})[name] = row.value
    file, content = run / "trackers.json", {str(length): own for length, own in sorted(figures.items())}
    sent: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for tracker in names:
        if sent.get(tracker) == content:
            continue
        try:
            with tracker_places(run):
                _send(tracker, run, figures)
        except Exception as error:  # of a network or a service, when all the work is done
            say(f"Results could not be sent to {tracker}: {error}. The same command with --resume tries again.")
        else:
            sent[tracker] = content
            write_json(file, sent)


def _send(name: Tracker, run: Path, figures: dict[int, dict[str, float]]) -> None:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # for which trackers look
    called = f"{run.name}-results"
    settings: dict[Tracker, dict[str, Any]] = {
        "tensorboard": {"run_name": called, "logging_dir": os.environ["TENSORBOARD_LOGGING_DIR"]},
        "wandb": {"run_name": os.environ["WANDB_PROJECT"], "name": called, "reinit": "finish_previous"},
        "mlflow": {"experiment_name": os.environ["MLFLOW_EXPERIMENT_NAME"], "run_name": called},
        "trackio": {"run_name": PROJECT, "name": called},
    }
    if name == "mlflow":
        import mlflow

        mlflow.end_run()  # that of the training
    tracker = LOGGER_TYPE_TO_CLASS[name](**settings[name])
    tracker.start()
    for length, values in sorted(figures.items()):
        tracker.log(values, step=length)
    tracker.finish()
