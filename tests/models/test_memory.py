"""What a process does with freed memory."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from skipwise.models.memory import freed_memory_kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    size = 200 * 2**20
    with freed_memory_kept() as kept:
        before = resident()
        torch.ones(size // 4).sum()
        between = resident()
    if not kept:
        pytest.skip("not glibc")
    assert between - before > 0.9 * size
    assert resident() - before < 0.5 * size
