"""How much memory a process holds, and how it keeps it."""

import ctypes
import sys

# From glibc's malloc.h: at most so many blocks that are mapped on their own, and the free memory that is given back.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next tensor, instead of giving every large block back.

    A block from the operating system is filled with zeros, page by page, when it is first touched; a training step
    frees and takes gigabytes. Only for glibc, where the default gives back all blocks above 32 MiB.

    Returns:
        Whether it does now.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
