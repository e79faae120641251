"""What makes some machines faster and others cannot do: asked for by plain options, left out with one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import import_utils

from skipwise.config import ModelConfig, TrainConfig
from skipwise.errors import UserError
from skipwise.models.forward import autocast
from skipwise.models.load import compute_dtype

# Earlier ones rotated every window of a batch by the positions of its first.
LIGER = "0.6"


def usable_attention(config: ModelConfig, device: torch.device) -> tuple[ModelConfig, list[str]]:
    """The configuration without a FlashAttention that this machine does not have, and a line that says so."""
    name = config.attn_implementation or ""
    if not name.startswith("flash_attention"):
        return config, []
    available: Callable[..., bool] = getattr(import_utils, f"is_{name.replace('attention', 'attn')}_available", _never)
    if device.type == "cpu":
        reason = "needs a GPU, and there is none"
    elif not available(kernels_fallback_ok=True):
        reason = "is not installed here, or not for this device"
    else:
        return config, []
    default = config.model_copy(update={"attn_implementation": None})
    return default, [f"model.attn_implementation: {name} {reason}; the default is used."]


def _never(**_: Any) -> bool:
    return False


@torch.no_grad()
def usable_dtype(config: ModelConfig, model: PreTrainedModel, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The compute dtype that a model runs in, and a line where it is another one than this machine is fast in.

    Raises:
        UserError: where the model does not run in the one asked for. DBRX adds its experts to a tensor of another one.
    """
    dtype = compute_dtype(config.dtype, device)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with autocast(device, dtype):
            if dtype != torch.float32:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if config.dtype != "auto":
            raise UserError(
                f"A model must run in its compute dtype, but {type(model).__name__} does not in {config.dtype}: "
                f"{reason}. Set model.dtype=float32.",
                code="compute_dtype_not_supported",
            ) from error
        return torch.float32, [f"model.dtype: {type(model).__name__} runs in float32 only ({reason}); that is used."]
    return dtype, []


def usable_speedups(config: TrainConfig, model: PreTrainedModel, device: torch.device) -> tuple[TrainConfig, list[str]]:
    """The configuration without what this machine or model cannot do, and a line for each that says why."""
    update: dict[str, bool] = {}
    lines = []
    if config.use_liger_kernel and (reason := _no_liger(device)):
        update["use_liger_kernel"] = False
        lines.append(f"train.use_liger_kernel {reason}; the model's own modules are used.")
    if config.torch_compile and (reason := _cannot_compile(model, device)):
        update["torch_compile"] = False
        lines.append(f"train.torch_compile does not work here ({reason}); layers run as they are.")
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        update["gradient_checkpointing"] = False
        lines.append(f"train.gradient_checkpointing: {type(model).__name__} has none; activations are kept.")
    return config.model_copy(update=update), lines


def _no_liger(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "needs a GPU, and there is none"
    there = import_utils.is_liger_kernel_available(min_version=LIGER)
    return None if there else f"needs the package liger-kernel, {LIGER} or later, which is not installed"


def use_liger(model: PreTrainedModel) -> None:
    """Fused kernels in place of a model's modules; not for the loss, which is ours."""
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _cannot_compile(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why not: no layers to be found, or what goes wrong with a function as small as can be."""
    if not _layers(model):
        return f"{type(model).__name__} has no layers that could be told apart"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin() + 1)(x).sum().backward()
    except Exception as error:  # whatever a backend raises
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Compile each layer (all share one graph), and take that back: evaluation has too many shapes."""
    layers = _layers(model)
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
