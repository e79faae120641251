"""Low-rank adapters (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314) through peft, and a plain model out of them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from skipwise.config import LoRAConfig
from skipwise.errors import UserError, nearest


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


def add_adapters(model: PreTrainedModel, config: LoRAConfig) -> PreTrainedModel:
    """The model with adapters in its linear layers, which alone are trained, with norms and embeddings if asked for."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit:
        # It would checkpoint layers in its own way; ours is chosen elsewhere.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
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
