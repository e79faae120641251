"""Short digests that tell a text, a document or a file from others."""

import hashlib


def short_digest(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text (in UTF-8) or of bytes."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    return hashlib.sha256(content).hexdigest()[:16]
