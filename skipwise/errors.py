"""What a user gets to see when the input is wrong: one message, exit code 2."""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

# Of conditions of a machine: what helps. Of every other one of a file, another path.
REMEDIES = {
    errno.ENOSPC: "Free space, or choose a place with more",
    errno.EDQUOT: "Free space, or choose a place with more",
    errno.EFBIG: "Choose a place that takes larger files",
    errno.EIO: "The device fails; choose another one",
    errno.EROFS: "Choose a place that can be written",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the limit of open files (sysctl fs.file-max)",
}


class UserError(ValueError):
    """A mistake in the input. The message says the rule, the value and the remedy.

    Attributes:
        code: a stable snake_case name of the rule that was broken, e.g. `target_not_above_window`. Messages may be
            reworded; codes stay.
    """

    # Every raise site gives a code. The default is for torch's DataLoader, which rebuilds an exception of a worker
    # process from its message alone.
    def __init__(self, message: str, *, code: str = "user_error") -> None:
        super().__init__(message)
        self.code = code


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for a name that is close to one of `options`, else the whole list.

    >>> nearest("pos", ["pose", "randpos"])
    " Did you mean 'pose'?"
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def of_machine(error: Exception) -> UserError | None:
    """What to say of an error of a file or a disk, wherever it was met; None of any other, and of our own files."""
    # safetensors writes the number of an error of the system into its message.
    hidden = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    if hidden is not None:
        error = OSError(int(hidden[1]), os.strerror(int(hidden[1])))
    if not isinstance(error, OSError):
        return None
    path = error.filename
    ours = isinstance(path, str | os.PathLike) and Path(__file__).parent in Path(path).parents
    if ours or (path is None and error.errno not in REMEDIES):
        return None
    where = "A file" if path is None else os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else path
    remedy = REMEDIES.get(error.errno or 0, "Name a path that exists and can be read, or an output that can be written")
    code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "path_not_usable"
    return UserError(
        f"{where} cannot be used: {error.strerror or error}. {remedy}. What is finished is kept, and the same command "
        "goes on (extend and demo with --resume).",
        code=code,
    )
