"""What makes some machines faster and others cannot do: asked for by plain options, left out with one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import import_utils

from skipwise.training.config import TrainConfig

# Earlier ones rotated every window of a batch by the positions of its first.
LIGER = "0.6"


def usable_kernels(config: TrainConfig, model: PreTrainedModel, device: torch.device) -> tuple[TrainConfig, list[str]]:
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
