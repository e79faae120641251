"""Low-rank adapters (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314) through peft, and a plain model out of them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from skipwise.errors import UserError, nearest
from skipwise.models.rope import inside_peft, read_rope, rope_before, rope_record, text_config
from skipwise.training.config import LoRAConfig
from skipwise.utils.files import read_json, write_json


def check_adapters(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Raise `UserError` without peft, or where the named modules are not there."""
    if not is_peft_available():
        raise UserError(
            "train.lora needs peft. Install it with: pip install 'skipwise[peft]'", code="package_not_installed"
        )
    if isinstance(config.target_modules, str):
        return
    there = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in config.target_modules if name not in there]
    if missing:
        raise UserError(
            f"train.lora.target_modules must name linear layers of {type(model).__name__}, which has no "
            f"{', '.join(missing)}.{nearest(missing[0], sorted(there))}",
            code="target_module_not_found",
        )


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int = 0) -> PreTrainedModel:
    """The model with adapters in its linear layers, which alone are trained, with norms and embeddings if asked for.

    Args:
        model: model to adapt; its linear layers are replaced.
        config: settings of the adapters.
        seed: seed of the adapters' first weights.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit:
        # It would checkpoint layers in its own way; ours is chosen elsewhere.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules],
        modules_to_save=norms_and_embeddings(model) if config.train_norms_and_embeddings else None,
        ensure_weight_tying=config.train_norms_and_embeddings and bool(model.config.tie_word_embeddings),
    )
    return get_peft_model(model, settings)  # type: ignore[return-value]  # passes on whatever it is asked


def norms_and_embeddings(model: PreTrainedModel) -> list[str]:
    """The names that normalisation layers and input embeddings go by, without what they are in.

    Long windows need them (LongLoRA, arXiv 2309.12307, section 3.3).
    """
    embedding = model.get_input_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is embedding or type(module).__name__.endswith("Norm")
    }
    return sorted(names)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A model of `add_adapters` with the adapters in its weights, as if these had been trained themselves."""
    plain: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    plain.requires_grad_(True)
    return plain


def trained_weights(model: nn.Module) -> dict[str, Any]:
    """What was trained, by name."""
    return {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}


CONFIG_FILE = "adapter_config.json"

# Beside that.
ROPE_FILE = "skipwise_rope.json"

# A setting that peft does not know, in `CONFIG_FILE`: it warns with this name, and goes on.
WARNING_KEY = "rope_is_lost_without_skipwise_load_adapter"

# What a base must have in common with the one that the adapter was trained on.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` of a model writes an adapter: of peft's around another, or one with
    `model.add_adapter` of transformers.
    """
    return hasattr(model, "get_base_model") or bool(getattr(model, "_hf_peft_config_loaded", False))


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that holds the layers and the RoPE; itself where peft is not around it.

    Raises:
        UserError: for the model inside of one of peft, which would be written with the adapter's layers as its own.
    """
    base = inside_peft(model)
    # What peft puts in the place of a layer, and of one that is trained whole.
    inside = any(hasattr(module, name) for module in model.modules() for name in ("base_layer", "original_module"))
    if inside and not is_adapted(model):
        raise UserError(
            "An adapter is written from the peft model, or merged, but this is the model inside, whose layers hold the "
            "adapter. Give what get_peft_model returned (of a Trainer trainer.model), or the model that "
            "merge_and_unload() returns.",
            code="adapter_inside_model",
        )
    return base


def write_rope(directory: Path, model: PreTrainedModel) -> None:
    """Write the RoPE of a base beside its adapters, the one from before, and what else tells that base from others.

    Nothing where there is no adapter; one with a name of its own is in a directory of that name.
    """
    places = [directory, *(directory / name for name in getattr(model, "peft_config", {}))]
    for file in [place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()]:
        base = base_of(model)
        text = text_config(base.config)
        sizes = {name: getattr(text, name, None) for name in _SIZES}
        record = {"original_length": read_rope(text).original, **rope_record(text), "before": rope_before(base)}
        write_json(file.parent / ROPE_FILE, {**sizes, **record})
        write_json(file, {**read_json(file), WARNING_KEY: True})
