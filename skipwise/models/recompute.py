"""What a layer keeps for its backward pass, and what it computes again there."""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from skipwise.models.attention import causal_attention

# What takes long: matrix products, and attention as a whole. All else reads and writes memory, once more.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    causal_attention._opoverload,
}


def recompute_activations(model: PreTrainedModel, mode: Literal["all", "selective"]) -> None:
    """Activation checkpointing, layer by layer.

    Args:
        model: any that transformers can checkpoint.
        mode: `all` keeps what goes into a layer, and computes the layer again; `selective` also keeps the results of
            matrix products and attention, and computes again what lies between.
    """
    keywords: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(keywords)


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
