"""Locks that killed builds of DeepSpeed's operators leave behind."""

import json
import os
from pathlib import Path

import pytest
import yaml

from skipwise import UserError
from skipwise.training import builds
from skipwise.training.builds import check_builds, stale_locks
from tests.commands import error_code, skipwise


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a killed build leaves it, in a folder of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "cpu" / "deepspeed_cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_that_nobody_holds_is_named_with_the_remedy(lock: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_builds(several_hosts=False)
    assert caught.value.code == "stale_build_lock"
    assert f"rm {lock}" in str(caught.value)
    assert lock.exists()


def test_a_build_that_goes_on_is_left_alone(lock: Path) -> None:
    """It holds its lock open, as PyTorch's does."""
    lock.unlink()
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    check_builds(several_hosts=False)
    os.close(held)
    with pytest.raises(UserError):
        check_builds(several_hosts=False)


@pytest.mark.parametrize("several_hosts", [True, False])
def test_where_nobody_says_who_holds_it_age_decides(
    lock: Path, several_hosts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not several_hosts:
        monkeypatch.setattr(builds, "_open_files", lambda: None)
    assert stale_locks(lock.parent.parent, several_hosts) == []
    os.utime(lock, (1, 1))
    assert stale_locks(lock.parent.parent, several_hosts) == [lock]


def test_an_extension_says_it_before_it_waits(lock: Path, config_file: Path, tmp_path: Path) -> None:
    engine = tmp_path / "zero.json"
    engine.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    values = yaml.safe_load(config_file.read_text())
    values["train"]["deepspeed"] = str(engine)
    config_file.write_text(yaml.safe_dump(values))
    assert error_code(skipwise("extend", config_file, "--output", tmp_path / "run", code=2)) == "stale_build_lock"
    assert not (tmp_path / "run").exists()
