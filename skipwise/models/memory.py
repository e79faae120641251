"""How a process keeps its memory."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h, with its defaults: how many blocks may be mapped on their own, how much free memory is kept.
_M_MMAP_MAX, _MMAP_MAX = -4, 65536
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 128 * 1024


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let the C library keep what is freed, for the next tensor, instead of giving every large block back.

    A block from the operating system is filled with zeros, page by page, when it is first touched; a training step
    frees and takes gigabytes. Only for glibc; at the end all that is free is given back.

    Yields:
        Whether it does.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield False
        return
    try:
        yield bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    finally:
        mallopt(_M_MMAP_MAX, _MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        trim(0)
