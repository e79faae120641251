"""What a process does with freed memory."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipwise.models.memory import freed_memory_kept, use_huge_pages


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_blocks_leave_no_holes() -> None:
    # When a block of this size has been freed, the C library serves others from its heap, where the upper of two keeps
    # the lower in place.
    code = """
import os, resource, torch
from skipwise.models.memory import large_blocks_given_back
if CHOSEN and not large_blocks_given_back():
    raise SystemExit(75)
size = 25 * 2**20
torch.ones(size // 4)
lower, upper = torch.ones(size // 4), torch.ones(size // 4)
del lower
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
"""

    def resident(chosen: bool) -> int:
        command = [sys.executable, "-c", code.replace("CHOSEN", str(chosen))]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}  # or both are mapped anyway
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode == 75:
            pytest.skip("not glibc")
        return int(done.stdout)

    assert resident(chosen=False) - resident(chosen=True) > 20 * 2**20


def test_huge_pages_are_a_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
