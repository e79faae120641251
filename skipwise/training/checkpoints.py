"""Checkpoints of the Trainer: written aside, sealed with hashes, renamed when whole, checked before they are used."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from skipwise.utils.files import write_json

MANIFEST = "manifest.json"
# Where a checkpoint is while it is written.
UNFINISHED = "unfinished"


def step_of(checkpoint: Path) -> int:
    """The training step of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def publish(unfinished: Path, checkpoint: Path) -> None:
    """Seal a checkpoint that is written to its end, and give it its name.

    The manifest has the SHA-256 of every file. All of it is on the disk before the name changes, so that whatever
    bears the name is whole, also after a power failure.
    """
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    for path in files:
        _to_disk(path)
    hashes = {str(path.relative_to(unfinished)): _sha256(path) for path in files}
    write_json(unfinished / MANIFEST, {"files": hashes})
    _to_disk(unfinished / MANIFEST)
    shutil.rmtree(checkpoint, ignore_errors=True)  # of the same step, from before a resumption
    unfinished.rename(checkpoint)
    _to_disk(checkpoint.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        hashes: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"has no readable {MANIFEST}"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if _sha256(path) != expected:
            return f"has another {name} than was written"
    return None


def newest_checkpoint(checkpoints: Path, log: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint, or None. Later ones, which are damaged, get another name and are left alone.

    Args:
        checkpoints: the directory they are in.
        say: told of every one that is damaged.
    """
    for checkpoint in sorted(checkpoints.glob("checkpoint-*"), key=step_of, reverse=True):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        log(f"{checkpoint.name} is damaged (it {wrong}) and is now called {aside.name}; training goes on without it.")
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file or directory is on the disk, where the system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a directory, on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
