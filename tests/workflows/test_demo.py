"""The demo, through its command, made small."""

import json
from pathlib import Path

import pytest

from skipwise.config.files import merge, parse_config, read_yaml, to_yaml
from skipwise.workflows import demo
from tests.commands import error_code, skipwise


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a demo of two steps goes."""
    evaluate = [{"name": "passkey", "context_lengths": [256, 512], "trials": 2}]
    small = {"lengths": {"target": 512}, "train": {"max_steps": 2, "per_device_train_batch_size": 1}}
    values = merge(read_yaml(demo.DEMO), {**small, "evaluate": evaluate})
    (tmp_path / "demo.yaml").write_text(to_yaml(parse_config(values)))
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo.yaml")
    return tmp_path / "runs" / "demo"


def stages(run: Path) -> set[str]:
    return {json.loads(line)["stage"] for line in (run / "results.jsonl").read_text().splitlines()}


def test_the_demo_runs_and_resumes(output: Path) -> None:
    said = skipwise("demo", "--output", output, "--resume")  # as `make demo` does
    assert "Nothing to resume" not in said
    assert stages(output) == {"original", "extended"}
    assert not (output / "plain").exists()
    assert (output / "report.html").is_file()
    assert error_code(skipwise("demo", "--output", output, code=2)) == "run_exists"
    weights = (output / "model" / "model.safetensors").read_bytes()
    skipwise("demo", "--output", output, "--resume")
    assert (output / "model" / "model.safetensors").read_bytes() == weights


def test_controls_are_added_to_a_demo_that_is_there(output: Path) -> None:
    skipwise("demo", "--output", output)
    weights = (output / "model" / "model.safetensors").read_bytes()
    skipwise("demo", "--output", output, "--resume", "--controls")
    assert (output / "model" / "model.safetensors").read_bytes() == weights
    assert stages(output / "interpolate") == {"interpolated"} and stages(output / "plain") == {"extended"}
    table = (output / "table.md").read_text()
    header = table.splitlines()[0]
    assert [name.strip() for name in header.split("|")][3:-1] == ["original", "interpolate", "plain", "pose"]
    skipwise("demo", "--output", output, "--resume")
    assert (output / "table.md").read_text() == table  # what is there is not left out
