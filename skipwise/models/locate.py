"""Where a model's files are. No torch, so that mistakes are found before anything heavy is imported."""

from pathlib import Path

from skipwise.errors import UserError, nearest

TINY = "builtin:tiny"
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
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(".gguf")
    if looks_local and not local.exists():
        raise UserError(f"The model must be a directory, a hub id or a .gguf file, but {path} does not exist.")
    if local.is_dir() and not (local / "config.json").is_file():
        inside = f", {path}/model" if (local / "model" / "config.json").is_file() else ""
        raise UserError(
            f"A model directory holds a config.json, but {path} does not. Name the directory that does{inside}."
        )
    return str(local) if local.exists() else path
