"""Forward passes that never make more logits than they need."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Logits exist for this many tokens at a time: 100 MB in float32 at a vocabulary of 50k.
CHUNK_ROWS = 512


@dataclass(frozen=True)
class LogitsRule:
    """What a model does to the product with its output layer: `cap * tanh(scale * product / cap)`.

    Attributes:
        scale: 1 in most families.
        cap: None for none, the usual case.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Logits, in place."""
        if self.scale != 1.0:
            product = product.mul_(self.scale)
        return product if self.cap is None else product.div_(self.cap).tanh_().mul_(self.cap)

    def chain(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the product from that of the logits, in place."""
        if self.cap is not None:
            grad = grad.mul_(1 - (logits / self.cap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


PLAIN = LogitsRule()
# Settings by which families scale or cap their logits, and what leaves them as they are.
_NEUTRAL = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}


def logits_rule(config: PreTrainedConfig) -> LogitsRule:
    """What the config says: Granite divides logits, Cohere multiplies them, Gemma 2 caps them.

    Only what is stored there counts. MiniCPM3 derives a `logits_scaling`, by which it divides hidden states before the
    output layer; what that layer is given has it already.
    """
    stored = vars(config.get_text_config())
    scale = (stored.get("logit_scale") or 1.0) / (stored.get("logits_scaling") or 1.0)
    return LogitsRule(float(scale), stored.get("final_logit_softcapping"))


@contextmanager
def _plain_logits(model: PreTrainedModel) -> Iterator[None]:
    """Leave the product with the output layer as it is."""
    config = model.config.get_text_config()
    if logits_rule(config) == PLAIN:
        yield
        return
    changed = [
        (owner, name, vars(owner)[name])
        for owner in (config, *model.modules())
        for name in _NEUTRAL
        if name in vars(owner)
    ]
    for owner, name, _ in changed:
        vars(owner)[name] = _NEUTRAL[name]  # past the types of some configs, which know a cap as a number only
    try:
        yield
    finally:
        for owner, name, value in changed:
            vars(owner)[name] = value


def loss_for_logits(
    model: nn.Module,
    unwrapped: PreTrainedModel,
    inputs: Mapping[str, Any],
    loss: Callable[[torch.Tensor, nn.Module], torch.Tensor],
) -> torch.Tensor:
    """What `loss` makes of the last hidden states and the output layer, in the place where that would make logits.

    Only there, inside the forward pass of the whole (wrapped) model, have engines that shard weights among devices
    those of the output layer together.

    Args:
        model: the model as wrapped for several devices, or as it is.
        unwrapped: the model itself.
        inputs: keywords of its forward pass.
        loss: of float[batch, n, d] and the output layer.
    """
    head = unwrapped.get_output_embeddings()
    before = vars(head).get("forward")
    head.forward = lambda hidden: loss(in_compute_dtype(hidden), head)
    try:
        with _plain_logits(unwrapped):  # or the loss would be scaled and capped as well
            result: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
    return result


def last_hidden_states(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float[batch, n, d]: what the output layer is applied to, in the compute dtype.

    Args:
        model: whole, on one device. Makes no logits.
        inputs: keywords of its forward pass.
    """
    return loss_for_logits(model, model, inputs, lambda hidden, head: hidden)


def in_compute_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Cast, once, to what autocast would cast it to at every use."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype` on weights that stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
