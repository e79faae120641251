"""Whether the weight files of a model hold the whole model.

transformers fills weights that a checkpoint does not hold with random numbers, and leaves out those that it does not
know, with a warning at most. A model must be loaded whole or not at all.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, cast

import torch
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
from skipwise.models.weight_files import named

# Tables that older versions of transformers saved, and new ones compute; and scales of a cache in 8 bits, for servers.
_COMPUTED = re.compile(
    r"(rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)|(attention|attn)\.(masked_)?bias|\.[kv]_scale)$"
)
# What transformers says of weights that it stacks (gates and experts), where some are missing. It logs which.
_NOT_CONVERTED = "conversion of the weights"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def check_names(path: str, location: str, keywords: Mapping[str, Any]) -> None:
    """Compare the names and shapes in the files of a model with those of its class, without reading the weights.

    Args:
        path: what the user called it.
        location: as for `from_pretrained`.
        keywords: of that.

    Raises:
        UserError: as `load_whole`.
    """
    with quiet_transformers():
        load_whole(path, location, {**keywords, "device_map": "meta"})


def load_whole(path: str, location: str, keywords: Mapping[str, Any]) -> PreTrainedModel:
    """What `AutoModelForCausalLM.from_pretrained` loads, if it is the whole model.

    Args:
        path: what the user called it.
        location: as for `from_pretrained`.
        keywords: of that.

    Raises:
        UserError: as `check_loaded`, and for weights that transformers cannot put together.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
        )
    except RuntimeError as error:
        if _NOT_CONVERTED not in str(error):
            raise
        raise UserError(
            f"A model must be loaded whole, but of {path} some weights that are stacked to one, such as those of "
            f"experts, are missing or do not fit each other. {_remedy([], [])}",
            code="weights_do_not_fit",
        ) from error
    model, found = loaded
    check_loaded(path, model, found)
    return cast("PreTrainedModel", model)


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
    unexpected = sorted(found.get("unexpected_keys", ()))
    extra = [name for name in unexpected if _belongs(name, model)]
    packed = [name for name, own in model.named_parameters() if own.is_floating_point() and own.element_size() == 1]
    wrong = []
    if missing:
        wrong.append(f"{_counted(missing, 'is', 'are')} missing ({named(missing)})")
    if misshapen:
        name, stored, wanted = misshapen[0]
        shapes = f"{name} is {list(stored)}, and the config wants {list(wanted)}"
        wrong.append(f"{_counted(misshapen, 'has', 'have')} another shape ({shapes})")
    if extra:
        wrong.append(f"{_counted(extra, 'has', 'have')} no place in the model ({named(extra)})")
    if packed:
        wrong.append(f"{_counted(packed, 'has', 'have')} 8 bits and no scale ({named(packed)})")
    made_up = " transformers would put random numbers there." if missing or misshapen else ""
    if wrong:
        raise UserError(
            f"A model must be loaded whole, but {path} is not: {', '.join(wrong)}.{made_up} "
            f"{_remedy(missing, unexpected)}",
            code="weights_do_not_fit",
        )
    check_tied(path, model)


def check_tied(path: str, model: PreTrainedModel) -> None:
    """Refuse weights that are one by the config and two in the files: transformers 5 takes them as they are, and
    transformers 4, vLLM and llama.cpp take one for both. Found on loaded weights only, not on the meta device.

    Raises:
        UserError: with their names.
    """
    said = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = sorted(said.keys() - model.all_tied_weights_keys.keys())
    if apart:
        raise UserError(
            f"The config.json of {path} says that {apart[0]} and {said[apart[0]]} are one (tie_word_embeddings), but "
            "its files hold two that differ, and programs disagree on which one counts. Set tie_word_embeddings to "
            f"false if the model was trained with two, else take {apart[0]} out of the files.",
            code="tied_weights_differ",
        )


def check_finite(path: str, model: PreTrainedModel) -> None:
    """Refuse a model with weights that are no numbers; a sum over each finds them.

    Raises:
        UserError: with their names.
    """
    with torch.no_grad():
        sums = {name: own.sum(dtype=torch.float32) for name, own in model.named_parameters() if own.is_floating_point()}
    broken = [name for name, own in sums.items() if not bool(own.isfinite())]
    if broken:
        raise UserError(
            f"The weights of a model must be numbers, but in {path} {_counted(broken, 'is', 'are')} not "
            f"({named(broken)}): its training went wrong, or they were too large for float16. Choose an earlier "
            "checkpoint.",
            code="weights_not_finite",
        )


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that was not loaded is of a part that the model has.

    Heads of other tasks and towers for images stand beside it, and are left out rightly.
    """
    if _COMPUTED.search(name) or _predicts_more(name, model):
        return False
    modules = {module for module, _ in model.named_modules()}
    parents = name.split(".")[:-1]
    known = next((n for n in range(len(parents), 0, -1) if ".".join(parents[:n]) in modules), 0)
    return known > 1 or (known == 1 and parents[0] != model.base_model_prefix)


def _predicts_more(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is of a layer behind the last one, for multi-token prediction (DeepSeek-V3, GLM-4.5)."""
    config, number = model.config.get_text_config(), _LAYER.search(name)
    more = getattr(config, "num_nextn_predict_layers", None) or 0
    return number is not None and 0 <= int(number[1]) - config.num_hidden_layers < more


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    """What to do, from how the names differ."""
    if any("lora_" in name for name in unexpected):
        return "They are those of adapters: merge these with peft (merge_and_unload), and write the model that results."
    if any("scale" in name.rpartition(".")[2] for name in unexpected):
        return (
            "They are scales of quantized weights, in a form that transformers does not undo: name the model that "
            "these were made from."
        )
    if wrapper := _wrapper(missing, unexpected):
        return f"Its names have a {wrapper!r} too much, left by a wrapper for training: write them without it."
    return "Download it again, or write it again with save_pretrained from the program that has the whole model."


def _wrapper(missing: list[str], unexpected: list[str]) -> str | None:
    """What stands too much in front of the names of weights, or within them; None if they differ in another way."""
    prefixes = {
        ours[: -len(name)] for name in missing[:3] for ours in unexpected if ours.endswith(f".{name}") and ours != name
    }
    if len(prefixes) == 1:
        return prefixes.pop()
    known = {part for name in missing for part in name.split(".")}
    within = {part for name in unexpected for part in name.split(".")} - known
    bare = {".".join(part for part in name.split(".") if part not in within) for name in unexpected}
    return ", ".join(sorted(within)) if within and bare & set(missing) else None


def _counted(names: Sized, one: str, many: str) -> str:
    """`"1 weight is"`, `"21 weights are"`."""
    return f"1 weight {one}" if len(names) == 1 else f"{len(names):,} weights {many}"
