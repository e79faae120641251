"""Adapters (peft) and the RoPE they were trained with, which an adapter alone does not hold."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from skipwise.errors import UserError
from skipwise.export.legacy import without_type
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.models.load import default_device, load_model
from skipwise.models.rope import lengths_of, restore_rope, rope_record, text_config
from skipwise.models.weight_files import check_pointers, named
from skipwise.models.windows import full_table
from skipwise.training.adapters import _SIZES, CONFIG_FILE, ROPE_FILE, WARNING_KEY
from skipwise.utils.files import read_json


def load_adapter(base: PreTrainedModel | str | Path, adapter: str | Path) -> PreTrainedModel:
    """An adapter on its base, with the RoPE that it was trained with.

    `PeftModel.from_pretrained` alone leaves the base its own RoPE, with a warning about a setting that it does not
    know: beyond the original window the model then finds nothing.

    Args:
        base: the model that the adapter was trained on, as it was before its extension; or where it is. A loaded one is
            changed in place.
        adapter: directory that `skipwise.save` wrote.

    Returns:
        The peft model, in evaluation mode.

    Raises:
        UserError: when the directory holds no adapter or no RoPE, or the base has other sizes or another RoPE than
            the base of the training had, before or after its extension. The base is then as it was.
    """
    if not is_peft_available():
        raise UserError(
            "load_adapter needs peft. Install it with: pip install 'skipwise[peft]'", code="package_not_installed"
        )
    directory = Path(adapter)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"An adapter has an {CONFIG_FILE}, but {directory} has none. Name the directory that skipwise.save wrote.",
            code="not_an_adapter",
        )
    if not (directory / ROPE_FILE).is_file():
        raise UserError(
            f"{directory} does not say with which RoPE the adapter was trained ({ROPE_FILE}). Write it with "
            "skipwise.save, or set the RoPE of its training on the base with set_rope_scaling and use "
            "PeftModel.from_pretrained.",
            code="adapter_without_rope",
        )
    if hasattr(base, "peft_config"):
        raise UserError(
            "load_adapter puts an adapter on a plain model, but this one has an adapter already. Name the base, or "
            "merge the other one into it first: merge_and_unload().",
            code="adapter_on_adapter",
        )
    rope = read_json(directory / ROPE_FILE)
    if missing := {*_SIZES, "original_length", "rope_parameters", "max_position_embeddings", "before"} - rope.keys():
        raise UserError(
            f"{directory / ROPE_FILE} must hold the RoPE of the training, but lacks {', '.join(sorted(missing))}. "
            "Write the adapter again with skipwise.save from the model that was trained.",
            code="adapter_rope_not_readable",
        )
    model = base if isinstance(base, PreTrainedModel) else load_model(ModelConfig(path=str(base)), default_device())
    _check_base(model, rope, directory)
    lengths = Lengths(rope["original_length"], rope["original_length"], rope["max_position_embeddings"])
    before, lengths_before = rope_record(model.config), lengths_of(model.config)
    restore_rope(model, rope["rope_parameters"], lengths)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf"Unexpected keyword arguments \['{WARNING_KEY}'\]")
        try:
            adapted = _adapted(model, directory)
        except UserError:
            restore_rope(model, before["rope_parameters"], lengths_before)
            raise
    adapted.eval()
    return adapted


def _adapted(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """A model with an adapter, all of it: peft leaves zeros where weights are missing, and passes over unknown ones.

    Raises:
        UserError: when the adapter's weights cannot be read, or are not those that its config speaks of.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    files = [directory / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    check_pointers(files)
    if not any(file.is_file() for file in files):
        raise UserError(
            f"{directory} holds an adapter_config.json and no weights (adapter_model.safetensors). Download them.",
            code="weights_not_found",
        )
    try:
        stored = load_peft_weights(str(directory), device="cpu")
        _check_finite(stored, directory)
        adapted: Any = PeftModel.from_pretrained(model, str(directory), ignore_mismatched_sizes=True)
    except UserError:
        raise
    except (SafetensorError, UnpicklingError, OSError, KeyError, ValueError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"The adapter in {directory} cannot be put on this base ({type(error).__name__}: {first}). Download it "
            "again, or update peft.",
            code="adapter_not_readable",
        ) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(wanted.keys() - stored.keys())
    misshapen = sorted(name for name in wanted.keys() & stored.keys() if wanted[name].shape != stored[name].shape)
    extra = sorted(name for name in stored.keys() - wanted.keys() if "lora_" in name)
    kinds = {"missing": missing, "of another shape": misshapen, "without a place": extra}
    wrong = [f"{len(names):,} are {what} ({named(names)})" for what, names in kinds.items() if names]
    if wrong:
        if hasattr(adapted, "unload"):
            adapted.unload()
        vars(model).pop("peft_config", None)
        raise UserError(
            f"An adapter must be loaded whole, but of the weights in {directory} {'; '.join(wrong)}. Write it again "
            "with skipwise.save from the model that was trained, or name the base of its training.",
            code="weights_do_not_fit",
        )
    return cast("PreTrainedModel", adapted)


def _check_finite(weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    if broken := sorted(name for name, own in weights.items() if not bool(own.isfinite().all())):
        raise UserError(
            f"The weights of an adapter must be numbers, but in {directory} {len(broken):,} are not ({named(broken)}): "
            "its training went wrong. Choose an earlier checkpoint.",
            code="weights_not_finite",
        )


def _check_base(model: PreTrainedModel, rope: dict[str, Any], adapter: Path) -> None:
    text = text_config(model.config)
    other = {
        name: (getattr(text, name, None), rope[name]) for name in _SIZES if getattr(text, name, None) != rope[name]
    }
    if other:
        name, (has, wanted) = next(iter(other.items()))
        raise UserError(
            f"The adapter {adapter} was trained on a base with {name} {wanted!r}; this base has {has!r}. Give the base "
            "that it was trained on.",
            code="adapter_base_mismatch",
        )
    has, before, trained = (_comparable(one) for one in (rope_record(text), rope["before"], rope))
    if has not in (before, trained):
        raise UserError(
            f"The adapter {adapter} was trained on a base with the RoPE {_in_words(before)}; this base has "
            f"{_in_words(has)}. Give the base that it was trained on.",
            code="adapter_base_other_rope",
        )


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters and window, the same whichever form of a config they were read from."""
    return {**without_type(record["rope_parameters"]), "max_position_embeddings": record["max_position_embeddings"]}


def _in_words(record: Mapping[str, Any]) -> str:
    table = full_table(dict(record))
    return f"{table['rope_type']}, theta {table['rope_theta']:,}, {record['max_position_embeddings']:,} tokens"
