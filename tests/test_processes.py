"""Forked processes end with the test, whatever ends it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import started


def sleep_with_a_child(arguments: list[str]) -> None:
    """The child is in a group of its own, as cells of a study are."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(arguments[0]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def test_a_failed_test_leaves_no_process_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        started(sleep_with_a_child, [str(tmp_path / "ids")], tmp_path / "out") as one,
    ):
        one.wait_until(lambda: (tmp_path / "ids").exists() and len((tmp_path / "ids").read_text().split()) == 2)
        raise ZeroDivisionError
    both = [
        psutil.Process(int(number))
        for number in (tmp_path / "ids").read_text().split()
        if psutil.pid_exists(int(number))
    ]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in both)


def test_the_failure_is_shown_also_where_the_process_has_hardly_begun(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), started(sleep_with_a_child, [str(tmp_path / "ids")], tmp_path / "out"):
        raise ZeroDivisionError
