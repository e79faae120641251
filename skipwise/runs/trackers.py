"""Results in experiment trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipwise.evaluation.results import EvalResult
from skipwise.training.config import Tracker
from skipwise.training.trackers import PROJECT, tracker_places
from skipwise.utils.files import write_json


def send_results(
    names: Sequence[Tracker], run: Path, rows: Sequence[EvalResult], log: Callable[[str], None] = print
) -> None:
    """Send the results of all stages, as a tracker's run of their own, whose steps are context lengths.

    What was sent already is not sent again; a tracker that fails is said and fails nothing else.

    Args:
        names: of trackers.
        run: the directory, by whose name the run is called.
        rows: of `results.jsonl`; those of single depths and those without a value are left out.
        say: told of failures.
    """
    results: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.depth is None and row.value is not None:
            name = f"{row.stage}/{row.evaluation}/{row.metric}"
            results.setdefault(row.context_length or 0, {})[name] = row.value
    file, content = run / "trackers.json", {str(length): own for length, own in sorted(results.items())}
    sent: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for tracker in names:
        if sent.get(tracker) == content:
            continue
        try:
            with tracker_places(run):
                _send(tracker, run, results)
        except Exception as error:  # of a network or a service, when all the work is done
            log(f"Results could not be sent to {tracker}: {error}. The same command with --resume tries again.")
        else:
            sent[tracker] = content
            write_json(file, sent)


def _send(name: Tracker, run: Path, results: dict[int, dict[str, float]]) -> None:
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
    for length, values in sorted(results.items()):
        tracker.log(values, step=length)
    tracker.finish()
