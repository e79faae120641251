"""What a layer keeps for its backward pass, and what it computes again there."""

import inspect
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from skipwise.errors import UserError
from skipwise.models import attention  # noqa: F401 (its operator is named below)

# What takes long: matmuls of weights, and attention that is one operator. All else reads and writes memory, and
# does so once more; eager attention, whose scores are large, is computed again.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.skipwise.causal_attention.default,
}


def checkpoint_activations(model: PreTrainedModel, mode: Literal["all", "selective"]) -> None:
    """Activation checkpointing, layer by layer.

    Args:
        model: any that transformers can checkpoint.
        mode: `all` keeps what goes into a layer, and computes the layer again; `selective` also keeps the results of
            matmuls and attention, and computes again what lies between.

    Raises:
        UserError: for `selective` on a model whose own code takes no such choice.
    """
    if mode == "selective" and "value" in inspect.signature(model._set_gradient_checkpointing).parameters:
        raise UserError(
            f"train.gradient_checkpointing=selective needs transformers' own checkpointing, but {type(model).__name__} "
            "brings an older one. Set it to true or false.",
            code="selective_checkpointing_not_supported",
        )
    keywords: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(keywords)


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
