"""Operators that DeepSpeed compiles when it first needs them, and the locks of builds that were killed."""

import os
import time
from contextlib import suppress
from pathlib import Path

from skipwise.errors import UserError

# A build takes two minutes. On another host, which nobody here can ask, an older lock belongs to none.
LONGEST_BUILD = 600.0


def build_folder() -> Path:
    """Where PyTorch keeps what it compiles: `$TORCH_EXTENSIONS_DIR`, else a folder in the user's cache."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(own)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def stale_locks(folder: Path, several_hosts: bool = False) -> list[Path]:
    """Locks of builds that nobody finishes, for which every later build would wait for ever.

    A process that compiles holds its lock open, which Linux shows of the processes of this host. Elsewhere, and where
    another host may be compiling in a shared folder, only a lock older than any build is stale.
    """
    locks = [lock for lock in folder.glob("**/lock") if lock.is_file()]
    if not locks:
        return []
    held = _open_files()
    known = held is not None and not several_hosts
    return sorted(
        lock
        for lock in locks
        if str(lock.resolve()) not in (held or ()) and (known or time.time() - lock.stat().st_mtime > LONGEST_BUILD)
    )


def check_builds(several_hosts: bool) -> None:
    """Raise `UserError` where a killed build left a lock for which DeepSpeed would wait without a word."""
    stale = stale_locks(build_folder(), several_hosts)
    if stale:
        raise UserError(
            "DeepSpeed compiles its operators one process at a time, but a build that was killed left its lock, for "
            f"which every later one would wait. Remove it: rm {' '.join(map(str, stale))}",
            code="stale_build_lock",
        )


def _open_files() -> set[str] | None:
    """The paths of the files that processes of this host hold open, as far as they may be seen; None if nobody says."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").exists():
        return None
    paths = set()
    for process in processes.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            for file in os.listdir(process / "fd"):  # noqa: PTH208
                with suppress(OSError):  # closed meanwhile
                    paths.add(os.readlink(process / "fd" / file))  # noqa: PTH115
    return paths
