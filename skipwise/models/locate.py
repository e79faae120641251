"""Where a model's files are. No torch, so that mistakes are found before anything heavy is imported."""

import difflib
from pathlib import Path

from skipwise.errors import UserError, nearest

TINY = "builtin:tiny"
# Where runs are by default; nobody's models on a hub begin like that.
RUNS = "runs/"
_EMBEDDED = {TINY: Path(__file__).parent / "tiny"}


def model_location(path: str) -> str:
    """The directory of a built-in model; any other path or hub id as it is.

    Raises:
        UserError: for a path that certainly leads to no model.
    """
    if path.startswith("builtin:"):
        if path not in _EMBEDDED:
            raise UserError(f"There is no built-in model {path!r}.{nearest(path, _EMBEDDED)}")
        return str(_EMBEDDED[path])
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~", RUNS)) or path.count("/") > 1 or path.endswith(".gguf")
    if looks_local and not local.exists():
        beside = [str(local.with_name(one.name)) for one in local.parent.glob("[!.]*")]
        close = difflib.get_close_matches(str(local), beside, n=1)
        raise UserError(
            f"The model must be a directory, a hub id or a .gguf file, but {path} does not exist."
            f"{f' Did you mean {close[0]}?' if close else ''}"
        )
    if local.is_dir() and not (local / "config.json").is_file():
        inside = f", {path}/model" if (local / "model" / "config.json").is_file() else ""
        raise UserError(
            f"A model directory holds a config.json, but {path} does not. Name the directory that does{inside}."
        )
    return str(local) if local.exists() else path


def is_hub_id(path: str) -> bool:
    """Whether the path of a model is `owner/name` (or `gpt2`) on a hub, and nothing on this machine."""
    here = Path(path).exists() or path.startswith((".", "/", "~", RUNS)) or path.endswith(".gguf")
    return path.count("/") <= 1 and ":" not in path and not here
