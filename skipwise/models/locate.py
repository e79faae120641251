"""Where a model's files are. No torch, so that mistakes are found before anything heavy is imported."""

import difflib
from pathlib import Path

from skipwise.errors import UserError, nearest

TINY = "builtin:tiny"
# Where peft keeps what an adapter is; transformers loads its base in place of the weights beside it.
ADAPTER = "adapter_config.json"
# Where runs are by default; taken for a directory of this machine.
RUNS = "runs/"
_EMBEDDED = {TINY: Path(__file__).parent / "tiny"}


def model_location(path: str) -> str:
    """The directory of a built-in model; any other path or hub id as it is.

    Raises:
        UserError: for a path that certainly leads to no model.
    """
    if path.startswith("builtin:"):
        if path not in _EMBEDDED:
            raise UserError(
                f"There is no built-in model {path!r}.{nearest(path, _EMBEDDED)}", code="unknown_builtin_model"
            )
        return str(_EMBEDDED[path])
    local = Path(path).expanduser() if path.startswith("~/") else Path(path)
    if _looks_local(path) and not local.exists():
        raise UserError(
            f"The model must be a directory, a hub id or a .gguf file, but {path} does not exist.{_beside(local)}",
            code="model_not_found",
        )
    if (local / ADAPTER).is_file():
        raise UserError(
            f"A model holds all of its weights, but {path} holds an adapter for another one ({ADAPTER}). Put it into "
            "its base first (merge_and_unload of peft) and name what was written, or name the base.",
            code="model_is_adapter",
        )
    if local.is_dir() and not (local / "config.json").is_file():
        inside = f", {path}/model" if (local / "model" / "config.json").is_file() else ""
        raise UserError(
            f"A model directory holds a config.json, but {path} does not. Name the directory that does{inside}.",
            code="model_config_missing",
        )
    return str(local) if local.exists() else path


def is_hub_id(path: str) -> bool:
    """Whether the path of a model is `owner/name` (or `gpt2`) on a hub, and nothing on this machine."""
    return ":" not in path and not _looks_local(path) and not Path(path).exists()


def _looks_local(path: str) -> bool:
    """Whether a path is none of a hub, by its looks."""
    return path.startswith((".", "/", "~", RUNS)) or path.count("/") > 1 or path.endswith(".gguf")


def _beside(missing: Path) -> str:
    """The model with a name like that of one that is not there."""
    found = {}
    for config in (*missing.parent.glob("*/config.json"), *missing.parent.glob("*/model/config.json")):
        found[config.relative_to(missing.parent).parts[0]] = str(config.parent)
    close = difflib.get_close_matches(missing.name, found, n=1)
    return f" Did you mean {found[close[0]]!r}?" if close else ""
