"""The weight files of a model: whether they can be opened, and whether they hold the whole model.

transformers fills weights that a checkpoint does not hold with random numbers, and leaves out those that it does not
know, with a warning at most. A model must be loaded whole or not at all.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from skipwise.errors import UserError

INDEX = "model.safetensors.index.json"
# Tables that older versions of transformers saved, and new ones compute.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|(attention|attn)\.(masked_)?bias)$")
# How the pointer files of a large-file store begin.
_POINTER = b"version https://git-lfs"
_SHOWN = 3


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights of some form, or says that it does."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", INDEX, "*.bin"))


def check_files(directory: Path) -> None:
    """Look at the weight files of a directory, without opening large ones.

    Raises:
        UserError: when there are none that can be opened, with the remedy.
    """
    found = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{index} must list the weights of the model, but cannot be read. Download it again.",
                code="weights_index_broken",
            ) from error
        absent = sorted(name for name in wanted if not (directory / name).is_file())
        if absent:
            raise UserError(
                f"{directory} lacks {len(absent)} of the {len(wanted)} files of its weights: {_named(absent)}. "
                "Download them.",
                code="weights_shard_missing",
            )
    pointers = [file.name for file in found if file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER)]
    if pointers:
        raise UserError(
            f"{directory} holds pointers of Git LFS instead of weights: {_named(pointers)}. Get the files with: "
            "git lfs pull.",
            code="weights_are_pointers",
        )
    pickles = sorted(file.name for file in directory.glob("*.bin") if file.name.startswith(("pytorch_model", "model")))
    if not found and pickles:
        raise UserError(
            f"Skipwise opens safetensors only, but {directory} holds its weights as pickles ({_named(pickles)}), which "
            "can run code when they are opened. If you trust them, write them once more: AutoModelForCausalLM"
            ".from_pretrained(DIRECTORY, use_safetensors=False).save_pretrained(NEW), and the same with AutoTokenizer.",
            code="weights_are_pickles",
        )
    if not found:
        raise UserError(
            f"{directory} holds a config.json and no weights (*.safetensors). Download them.", code="weights_not_found"
        )


def check_names(location: str, keywords: Mapping[str, Any]) -> None:
    """Compare the names and shapes in the files of a model with those of its class, without reading the weights.

    Args:
        location: as for `from_pretrained`.
        keywords: of that.

    Raises:
        UserError: as `check_loaded`.
    """
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **keywords
        )
    model, found = loaded
    check_loaded(location, model, found)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of transformers on what it loaded: we look at that ourselves."""
    shown, verbosity = is_progress_bar_enabled(), get_verbosity()
    disable_progress_bar()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shown:
            enable_progress_bar()


def check_loaded(path: str, model: PreTrainedModel, found: Mapping[str, Iterable[Any]]) -> None:
    """Refuse a model that was not loaded whole.

    Args:
        path: where it is.
        model: as loaded.
        found: what `from_pretrained` returns with `output_loading_info`. Tied weights, and names that the class of the
            model leaves out on purpose, are not in it.

    Raises:
        UserError: for weights that are missing, have another shape, or have a place in no part of the model.
    """
    missing = sorted(found.get("missing_keys", ()))
    misshapen = sorted(found.get("mismatched_keys", ()))
    extra = [name for name in sorted(found.get("unexpected_keys", ())) if _belongs(name, model)]
    if not missing and not misshapen and not extra:
        return
    wrong = []
    if missing:
        wrong.append(f"{_counted(missing, 'is', 'are')} missing ({_named(missing)})")
    if misshapen:
        name, stored, wanted = misshapen[0]
        shapes = f"{name} is {list(stored)}, and the config wants {list(wanted)}"
        wrong.append(f"{_counted(misshapen, 'has', 'have')} another shape ({shapes})")
    if extra:
        wrong.append(f"{_counted(extra, 'has', 'have')} no place in the model ({_named(extra)})")
    made_up = " transformers would put random numbers there." if missing or misshapen else ""
    raise UserError(
        f"A model must be loaded whole, but {path} is not: {', '.join(wrong)}.{made_up} "
        f"{_remedy(missing, list(found.get('unexpected_keys', ())))}",
        code="weights_do_not_fit",
    )


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that was not loaded is of a part that the model has.

    Heads of other tasks and towers for images stand beside it, and are left out rightly.
    """
    if _COMPUTED.search(name):
        return False
    modules = {module for module, _ in model.named_modules()}
    parents = name.split(".")[:-1]
    known = next((n for n in range(len(parents), 0, -1) if ".".join(parents[:n]) in modules), 0)
    return known > 1 or (known == 1 and parents[0] != model.base_model_prefix)


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    """What to do, from how the names differ."""
    prefixes = {
        ours[: -len(name)]
        for name in missing[:_SHOWN]
        for ours in unexpected
        if ours.endswith(f".{name}") and ours != name
    }
    if len(prefixes) == 1:
        prefix = prefixes.pop()
        return f"The names in its files begin with {prefix!r}, left by a wrapper for training: write them without it."
    return "Download it again, or write it again with save_pretrained from the program that has the whole model."


def _counted(names: Sized, one: str, many: str) -> str:
    """`"1 weight is"`, `"21 weights are"`."""
    return f"1 weight {one}" if len(names) == 1 else f"{len(names):,} weights {many}"


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
