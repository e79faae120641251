"""How a process keeps its memory on a CPU."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# From glibc's malloc.h, with its defaults: how many blocks may be mapped on their own, how much free memory is kept.
_M_MMAP_MAX, _MMAP_MAX = -4, 65536
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 * 1024
# And the size from which a block is mapped on its own. Tensors of a whole layer are larger, tiles of attention smaller.
_M_MMAP_THRESHOLD, _LARGE = -3, 16 * 2**20


def use_huge_pages() -> None:
    """Let torch ask for pages of 2 MB in large tensors, which are filled with zeros several times as fast.

    For Linux. It holds if the process has made no tensor yet; a setting in the environment wins.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU begin anew; that of a process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: on a GPU of CUDA by tensors, on a CPU by the whole process; None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let the C library keep what is freed, for the next tensor, instead of giving every large block back.

    A block from the operating system is filled with zeros, page by page, when it is first touched; a training step
    frees and takes gigabytes. Only for glibc; at the end all that is free is given back.

    Yields:
        Whether it does.
    """
    library = _glibc()
    if library is None:
        yield False
        return
    try:
        yield bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))
    finally:
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)


def large_blocks_given_back() -> bool:
    """Let the C library give every block of 16 MB or more back as soon as it is freed, from now on.

    The opposite of `freed_memory_kept`, for steps that are to be small: a heap that holds large blocks of several sizes
    is full of holes. The C library by itself raises its limit to 32 MB as blocks are freed.

    Returns:
        Whether it does: only glibc.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGE))


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
