"""What makes some machines faster and others cannot do: asked for by plain options, left out with one line."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from skipwise.config import ModelConfig, TrainConfig


def usable_attention(config: ModelConfig, device: torch.device) -> tuple[ModelConfig, list[str]]:
    """The configuration without a FlashAttention that this machine does not have, and a line that says so."""
    name = config.attn_implementation or ""
    if not name.startswith("flash_attention"):
        return config, []
    package = "flash_attn_interface" if name.endswith("3") else "flash_attn"
    reason = _missing(device, package)
    if reason is None:
        return config, []
    default = config.model_copy(update={"attn_implementation": None})
    return default, [f"model.attn_implementation: {name} {reason}; the default is used."]


def usable_speedups(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, list[str]]:
    """The configuration without what this machine cannot do, and a line for each that says why."""
    update: dict[str, bool] = {}
    lines = []
    if config.use_liger_kernel and (reason := _missing(device, "liger_kernel")):
        update["use_liger_kernel"] = False
        lines.append(f"train.use_liger_kernel {reason}; the model's own modules are used.")
    if config.torch_compile and (reason := _cannot_compile(device)):
        update["torch_compile"] = False
        lines.append(f"train.torch_compile does not work here ({reason}); layers run as they are.")
    return config.model_copy(update=update), lines


def _missing(device: torch.device, package: str) -> str | None:
    """Why a package of GPU kernels cannot be used."""
    if device.type == "cpu":
        return "needs a GPU, and there is none"
    return None if importlib.util.find_spec(package) else f"needs the package {package}, which is not installed"


def _cannot_compile(device: torch.device) -> str | None:
    """The first line of what goes wrong with a function as small as can be; it needs a compiler, or Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a backend raises
        return str(error).strip().splitlines()[0]
    return None


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Compile each layer (all share one graph), and take that back: evaluation has too many shapes."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
