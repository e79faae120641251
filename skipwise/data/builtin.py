"""`builtin:python`: the documentation and sources of the Python standard library on this machine."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

PYTHON = "builtin:python"

# Generated tables, tests and vendored wheels are no prose or code that anyone reads.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}
_SHORTEST_MODULE = 2_000


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every documentation topic and every module of some length, in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT & set(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= _SHORTEST_MODULE:
                yield relative.as_posix(), text
