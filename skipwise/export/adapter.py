"""Adapters (peft) and the RoPE they were trained with, which an adapter alone does not hold."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from skipwise.config import ModelConfig
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.load import default_device, load_model
from skipwise.models.rope import read_rope, restore_rope, text_config
from skipwise.models.weight_files import check_pointers, named
from skipwise.runs import read_json, write_json

# Beside `adapter_config.json`.
ROPE_FILE = "skipwise_rope.json"
# What a base must have in common with the one that the adapter was trained on.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether a model is one of peft around another."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def write_rope(directory: Path, config: PreTrainedConfig) -> None:
    """Write the RoPE of a base, and what tells it from others, beside its adapter."""
    text = text_config(config)
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    rope = {"rope_parameters": text.rope_parameters, "max_position_embeddings": text.max_position_embeddings}
    write_json(directory / ROPE_FILE, {**sizes, "original_length": read_rope(config).original, **rope})


def load_adapter(base: PreTrainedModel | str | Path, adapter: str | Path) -> PreTrainedModel:
    """An adapter on its base, with the RoPE that it was trained with.

    `PeftModel.from_pretrained` alone leaves the base its own RoPE, without a word: beyond the original window the model
    then finds nothing.

    Args:
        base: the model that the adapter was trained on, as it was before its extension; or where it is. A loaded one is
            changed in place.
        adapter: directory that `skipwise.save` wrote.

    Returns:
        The peft model, in evaluation mode.

    Raises:
        UserError: when the directory holds no adapter or no RoPE, or the base is another model or was extended in
            another way.
    """
    if not is_peft_available():
        raise UserError(
            "load_adapter needs peft. Install it with: pip install 'skipwise[peft]'", code="package_not_installed"
        )
    directory = Path(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            f"An adapter has an adapter_config.json, but {directory} has none. Name the directory that skipwise.save "
            "wrote.",
            code="not_an_adapter",
        )
    if not (directory / ROPE_FILE).is_file():
        raise UserError(
            f"{directory} does not say with which RoPE the adapter was trained ({ROPE_FILE}). Write it with "
            "skipwise.save, or set the RoPE of its training on the base with set_rope_scaling and use "
            "PeftModel.from_pretrained.",
            code="adapter_without_rope",
        )
    rope = read_json(directory / ROPE_FILE)
    model = base if isinstance(base, PreTrainedModel) else load_model(ModelConfig(path=str(base)), default_device())
    _check_base(model, rope, directory)
    lengths = Lengths(rope["original_length"], rope["original_length"], rope["max_position_embeddings"])
    restore_rope(model, rope["rope_parameters"], lengths)
    adapted = _adapted(model, directory)
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
        adapted: Any = PeftModel.from_pretrained(model, str(directory), ignore_mismatched_sizes=True)
    except (SafetensorError, UnpicklingError, OSError, ValueError) as error:
        raise UserError(
            f"The adapter in {directory} cannot be read: {str(error).splitlines()[0]}. Download it again.",
            code="adapter_not_readable",
        ) from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(wanted.keys() - stored.keys())
    misshapen = sorted(name for name in wanted.keys() & stored.keys() if wanted[name].shape != stored[name].shape)
    extra = sorted(name for name in stored.keys() - wanted.keys() if "lora_" in name)
    kinds = {"missing": missing, "of another shape": misshapen, "without a place": extra}
    wrong = [f"{len(names):,} are {what} ({named(names)})" for what, names in kinds.items() if names]
    if wrong:
        raise UserError(
            f"An adapter must be loaded whole, but of the weights in {directory} {'; '.join(wrong)}. Write it again "
            "with skipwise.save from the model that was trained, or name the base of its training.",
            code="weights_do_not_fit",
        )
    return cast("PreTrainedModel", adapted)


def _check_base(model: PreTrainedModel, rope: dict[str, Any], adapter: Path) -> None:
    text = text_config(model.config)
    other = {
        name: (getattr(text, name, None), rope[name]) for name in _SIZES if getattr(text, name, None) != rope[name]
    }
    if other:
        name, (has, wanted) = next(iter(other.items()))
        raise UserError(
            f"An adapter goes on the model that it was trained on, but for {adapter} that has {name} {wanted!r}, and "
            f"this base {has!r}. Name the base of its training.",
            code="adapter_base_mismatch",
        )
    info = read_rope(model.config)
    same = text.rope_parameters == rope["rope_parameters"]
    if not same and (info.current != info.original or info.rope_type != "default"):
        raise UserError(
            f"An adapter brings the RoPE of its training, but the base of {adapter} was extended in another way "
            f"({info.rope_type}, {info.original:,} -> {info.current:,} tokens). Name the base as it was before.",
            code="adapter_base_extended",
        )
