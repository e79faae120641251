"""Short hashes that tell a text, a document or a file from others."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from skipwise.errors import UserError

# Smaller files are hashed in a tenth of a second; the hash of a larger one is kept.
LARGE_FILE = 2**28


def cache_directory() -> Path:
    """Where stores and hashes are kept: `$SKIPWISE_CACHE`, else `skipwise` in the user's cache directory."""
    own = os.environ.get("SKIPWISE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{shared}/skipwise").expanduser()


def short_hash(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text (in UTF-8) or of bytes."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    return hashlib.sha256(content).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. A file is read once (about 2 GB/s) until it changes."""
    stat = path.stat()
    return _file_hash(path.resolve(), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino))


@lru_cache(maxsize=100_000)
def _file_hash(path: Path, state: tuple[int, ...]) -> str:
    kept = cache_directory() / "hashes" / short_hash(repr((str(path), state)))
    large = state[0] >= LARGE_FILE
    if large and kept.exists() and len(known := kept.read_text(encoding="utf-8")) == 64:
        return known
    with path.open("rb") as file:
        content_hash = hashlib.file_digest(file, "sha256").hexdigest()
    if large:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(content_hash, encoding="utf-8")
    return content_hash


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines, whose numbers may be equal, write to one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def share_weights(directory: Path) -> None:
    """Let whoever may read the config read the weights, which safetensors writes for their owner only."""
    for file in directory.glob("*.safetensors"):
        file.chmod((directory / "config.json").stat().st_mode)


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """`write_text` of a JSON object, indented unless nobody is to read it."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this program wrote.

    Raises:
        UserError: when the file holds something else: it was changed or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds {type(content).__name__}, not an object")
    return content


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} was written by Skipwise and must be read by it, but cannot be: {what}. Bring the file back, or begin "
        "again in another directory.",
        code="damaged_file",
    )


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to fill under another name, which is `output` in the end, or nothing is.

    Raises:
        UserError: when something is in the way.
    """
    if output.exists():
        raise UserError(f"A new directory is written, but {output} exists. Choose another.", code="output_exists")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a last line that was cut off while it was written; [] if it is not there."""
    if not path.exists():
        return []
    *whole, _rest = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines += [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number} is damaged ({error}). Remove the line; it is measured again.", code="damaged_line"
            ) from error
    return lines


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append an object to a JSONL file, in place of one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as opened:
        end = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        whole = opened.read().rfind(b"\n") + 1 if end and not _ends_line(opened, end) else end
        opened.truncate(whole)
        opened.write(json.dumps(value).encode() + b"\n")


def _ends_line(opened: Any, end: int) -> bool:
    opened.seek(end - 1)
    ends: bool = opened.read(1) == b"\n"
    opened.seek(0)
    return ends


def format_bytes(size: float) -> str:
    """`"13.5 GB"`, `"410 MB"`: thousands, as memory is sold."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
