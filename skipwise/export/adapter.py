"""Adapters (peft) and the RoPE they were trained with, which an adapter alone does not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from skipwise.config import ModelConfig
from skipwise.errors import UserError
from skipwise.lengths import Lengths
from skipwise.models.legacy import without_type
from skipwise.models.load import default_device, load_model
from skipwise.models.rope import read_rope, restore_rope, rope_before, rope_record, text_config
from skipwise.models.windows import far_table
from skipwise.runs import read_json, write_json

# Beside `adapter_config.json`.
ROPE_FILE = "skipwise_rope.json"
# What a base must have in common with the one that the adapter was trained on.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether a model is one of peft around another."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that peft is around; any other as it is."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def write_rope(directory: Path, model: PreTrainedModel) -> None:
    """Write the RoPE of an adapter's base beside it, the one from before, and what else tells that base from others.

    Nothing where there is no adapter.
    """
    if not (directory / "adapter_config.json").is_file():
        return
    base = base_of(model)
    text = text_config(base.config)
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    record = {"original_length": read_rope(text).original, **rope_record(text), "before": rope_before(base)}
    write_json(directory / ROPE_FILE, {**sizes, **record})


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
        UserError: when the directory holds no adapter or no RoPE, or the base is another model or has another RoPE
            than the base of the training had, before or after its extension.
    """
    if not is_peft_available():
        raise UserError(
            "load_adapter needs peft. Install it with: pip install 'skipwise[peft]'", code="package_not_installed"
        )
    from peft import PeftModel

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
    adapted: PreTrainedModel = PeftModel.from_pretrained(model, str(directory)).eval()  # type: ignore[assignment]
    return adapted


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
    has, before, trained = (_comparable(one) for one in (rope_record(text), rope["before"], rope))
    if has not in (before, trained):
        raise UserError(
            f"An adapter brings the RoPE of its training, and the base of {adapter} had another before that than this "
            f"one: {_in_words(before)}, not {_in_words(has)}. Name the base of its training, as it was then.",
            code="adapter_base_other_rope",
        )


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters and window, the same whichever form of a config they were read from."""
    return {**without_type(record["rope_parameters"]), "max_position_embeddings": record["max_position_embeddings"]}


def _in_words(record: Mapping[str, Any]) -> str:
    table = far_table(dict(record))
    return f"{table['rope_type']}, theta {table['rope_theta']:,}, {record['max_position_embeddings']:,} tokens"
