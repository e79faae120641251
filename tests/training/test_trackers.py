"""Trackers get the losses of the training and the results of the results."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
import yaml

from skipwise import UserError
from skipwise.runs import trackers
from skipwise.training.trackers import check_trackers
from tests.processes import command, started
from tests.ranks import extension
from tests.rows import row as result


def test_a_tracker_that_is_not_there_is_said_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipwise.training.trackers.find_spec", lambda name: None)
    check_trackers([])
    with pytest.raises(UserError, match="names mlflow, which is not installed"):
        check_trackers(["mlflow"])


def test_training_and_results_reach_tensorboard_and_trackio(tmp_path: Path) -> None:
    """Through the real command; read back with TensorBoard's own reader and from trackio's files."""
    pytest.importorskip("trackio")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file, run = extension(tmp_path, report_to=["tensorboard", "trackio"]), tmp_path / "mine"
    environment = {"PATH": "", "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    arguments = ["extend", str(file), "--output", str(run)]
    with started(command, arguments, tmp_path / "printed", environment) as process:
        assert process.wait() == 0, process.printed
    assert yaml.safe_load((run / "resolved.yaml").read_text())["train"]["report_to"] == ["tensorboard", "trackio"]
    logged = map(json.loads, (run / "train.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in logged if "loss" in line]
    (row,) = [one for one in map(json.loads, (run / "results.jsonl").read_text().splitlines()) if one["depth"] is None]
    scalars = {}
    for events in (run / "tensorboard").rglob("events.out*"):
        reader = accumulator.EventAccumulator(str(events.parent)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses, abs=1e-3)
    assert scalars["extended/passkey/accuracy"] == [(256, row["value"])]
    (database,) = (tmp_path / "trackio").rglob("skipwise*.db")
    with sqlite3.connect(database) as connection:
        sent = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in sent} == {"mine", "mine-results"}
    assert [json.loads(metrics) for name, _, metrics in sent if name == "mine-results"] == [
        {"extended/passkey/accuracy": row["value"]}
    ]


def test_every_metric_has_a_name_and_nothing_is_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity comes with bits per byte; a tracker that fails is said, and asked again next time."""
    sent: list[dict[int, dict[str, float]]] = []
    said: list[str] = []
    rows = [
        result("original", "perplexity", 256, 20.0),
        result("original", "perplexity", 256, 1.5, metric="bits_per_byte"),
        result("original", "harness/arc", None, 0.5, metric="score"),
    ]

    def send(name: str, run: Path, results: dict[int, dict[str, float]]) -> None:
        sent.append(results)
        if len(sent) == 1:
            raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "_send", send)
    for _ in range(3):
        trackers.send_results(["wandb"], tmp_path, rows, said.append)
    assert len(sent) == 2 and len(said) == 1 and "wandb: no network" in said[0]
    trackers.send_results(["wandb", "mlflow"], tmp_path, rows, said.append)
    assert len(sent) == 3  # one that has them is left alone
    assert sent[1] == {
        256: {"original/perplexity/perplexity": 20.0, "original/perplexity/bits_per_byte": 1.5},
        0: {"original/harness/arc/score": 0.5},
    }


def test_places_are_told_for_one_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with trackers.tracker_places(tmp_path):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "mine"
