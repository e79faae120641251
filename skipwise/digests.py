"""Short digests that tell a text, a document or a file from others."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

# Smaller files are hashed in a tenth of a second; the hash of a larger one is kept.
LARGE_FILE = 2**28


def cache_directory() -> Path:
    """Where stores and hashes are kept: `$SKIPWISE_CACHE`, else `skipwise` in the user's cache directory."""
    own = os.environ.get("SKIPWISE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{shared}/skipwise").expanduser()


def short_digest(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text (in UTF-8) or of bytes."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    return hashlib.sha256(content).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. A file is read once (about 2 GB/s) until it changes."""
    stat = path.stat()
    return _file_digest(path.resolve(), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino))


@lru_cache(maxsize=100_000)
def _file_digest(path: Path, state: tuple[int, ...]) -> str:
    kept = cache_directory() / "hashes" / short_digest(repr((str(path), state)))
    large = state[0] >= LARGE_FILE
    if large and kept.exists() and len(known := kept.read_text(encoding="utf-8")) == 64:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if large:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest, encoding="utf-8")
    return digest
