"""The demo, through its command, made small."""

import json
from pathlib import Path

import pytest

from skipwise import demo
from skipwise.cli import app, run
from skipwise.config_files import merge, read_yaml, to_yaml
from skipwise.config_files import parse_config as parse


def test_the_demo_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = [{"name": "passkey", "context_lengths": [256, 512], "trials": 2}]
    small = {"lengths": {"target": 512}, "train": {"max_steps": 2, "per_device_train_batch_size": 1}}
    values = merge(read_yaml(demo.DEMO), {**small, "evaluate": evaluate})
    (tmp_path / "demo.yaml").write_text(to_yaml(parse(values)))
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo.yaml")
    output = tmp_path / "runs" / "demo"

    def call(*more: str) -> int:
        return run(lambda: app(["demo", "--output", str(output), *more], standalone_mode=False))

    assert call("--resume") == 0  # as `make demo` does
    said = capsys.readouterr().out
    assert "Nothing to resume" not in said and "twice" in said
    stages = {json.loads(line)["stage"] for line in (output / "results.jsonl").read_text().splitlines()}
    assert stages == {"original", "interpolated", "extended"}
    assert "plain" in (output / "table.md").read_text()
    assert (output / "report.html").is_file() and (output / "plain" / "model" / "config.json").is_file()
    assert call() == 2  # there is a run
    weights = (output / "model" / "model.safetensors").read_bytes()
    assert call("--resume") == 0
    assert (output / "model" / "model.safetensors").read_bytes() == weights
