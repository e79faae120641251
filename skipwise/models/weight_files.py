"""The weight files of a model directory: which of them transformers opens, and whether they can be opened. No torch."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from skipwise.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# How the pointer files of a large-file store begin.
_POINTER = b"version https://git-lfs"
# Files of a tokenizer where there is no `tokenizer.json`.
_TOKENIZER = ("vocab*", "merges*", "*.model")
# Stored numbers that are no weights without a scale.
_QUANTIZED = ("F8", "F6", "F4", "I8", "U8", "I4", "U4")
_SHOWN = 3


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights of some form, or says that it does."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", INDEX, "*.bin"))


def check_files(directory: Path, named: str | None = None, quantized: bool = False) -> list[Path]:
    """Look at the weight files of a directory: at their headers, not at the weights.

    Args:
        directory: of a model.
        named: the file of its weights, where its config names one (`transformers_weights`).
        quantized: whether its config says that they are quantized.

    Returns:
        Those that transformers opens.

    Raises:
        UserError: when there are none that can be opened, with the remedy.
    """
    files = _opened(directory, named)
    tokenizer = directory / "tokenizer.json"
    others = [file for pattern in _TOKENIZER for file in directory.glob(pattern)]
    check_pointers([*files, *([tokenizer] if tokenizer.exists() else others)])
    for file in files:
        _check_header(file, quantized)
    return files


def check_pointers(files: Iterable[Path]) -> None:
    """Refuse files that a large-file store has left its pointers in place of.

    Raises:
        UserError: with how to get the files.
    """
    pointers = sorted(file for file in files if is_pointer(file))
    if pointers:
        names = named([file.name for file in pointers])
        raise UserError(
            f"{pointers[0].parent} holds pointers of Git LFS instead of files: {names}. Get these with: git lfs pull.",
            code="weights_are_pointers",
        )


def is_pointer(file: Path) -> bool:
    """Whether a large-file store has left a pointer in a file's place."""
    return file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER)


def named(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _opened(directory: Path, named_file: str | None) -> list[Path]:
    """The files that transformers opens, in its order of preference.

    Raises:
        UserError: when there are none, or some of them are absent.
    """
    whole = directory / (named_file or WEIGHTS)
    if whole.is_file() and whole.suffix == ".safetensors":
        return [whole]
    index = directory / INDEX
    if index.is_file():
        return _listed(index)
    others = sorted(file.name for file in (*directory.glob("*.safetensors"), *directory.glob("*.pth")))
    bins = [file for file in directory.glob("*.bin") if file.name.startswith(("pytorch_model", "model"))]
    check_pointers(bins)
    if pickles := sorted(file.name for file in bins):
        raise UserError(
            f"Skipwise opens safetensors only, but {directory} holds its weights as pickles ({named(pickles)}), which "
            "can run code when they are opened. If you trust them, write them once more: AutoModelForCausalLM"
            ".from_pretrained(DIRECTORY, use_safetensors=False).save_pretrained(NEW), and the same with AutoTokenizer. "
            "Or use the space safetensors/convert of the Hugging Face hub.",
            code="weights_are_pickles",
        )
    if others:
        raise UserError(
            f"transformers opens {WEIGHTS}, or the files that {INDEX} lists, but {directory} holds only "
            f"{named(others)}. Download one of these two. Weights in a layout of their own (consolidated.safetensors, "
            "consolidated.00.pth) must be converted first: look for the same model in the layout of transformers.",
            code="weights_in_other_layout",
        )
    raise UserError(
        f"{directory} holds a config.json and no weights (*.safetensors). Download them.", code="weights_not_found"
    )


def _listed(index: Path) -> list[Path]:
    """The files of an index.

    Raises:
        UserError: when it cannot be read, or some of them are absent.
    """
    try:
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in wanted]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        check_pointers([index])
        raise UserError(
            f"{index} must list the weights of the model, but cannot be read. Download it again.",
            code="weights_index_broken",
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{index.parent} lacks {len(absent)} of the {len(wanted)} files of its weights: {named(absent)}. "
            "Download them.",
            code="weights_shard_missing",
        )
    return files


def _check_header(file: Path, quantized: bool) -> None:
    """Refuse a file that is cut off, and weights that are quantized where nothing says how."""
    try:
        with safe_open(file, framework="np") as opened:
            kinds = {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{file} must be a whole safetensors file, but is none: {str(error).splitlines()[0]}. Download it again.",
            code="weights_file_broken",
        ) from error
    small = [name for name, kind in kinds.items() if name.endswith(".weight") and kind.startswith(_QUANTIZED)]
    if small and not quantized:
        raise UserError(
            f"{file} holds quantized weights ({named(small)}: {kinds[small[0]]}), but the config.json does not say "
            "how. Name the model that they were made from, or bring back the quantization_config.",
            code="weights_quantized",
        )
