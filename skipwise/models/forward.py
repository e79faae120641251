"""Forward passes that never make more logits than they need."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Logits exist for this many tokens at a time: 100 MB in float32 at a vocabulary of 50k.
CHUNK_ROWS = 512


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
    head.forward = lambda hidden: loss(for_products(hidden), head)
    try:
        result: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
    return result


def last_hidden_states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """float[batch, n, d]: what the output layer is applied to, in the dtype of matrix products.

    Args:
        model: whole, on one device. Makes logits of one token only.
        inputs: keywords of its forward pass.
    """
    with _captured(model.get_decoder()) as captured:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return for_products(captured[0])


def for_products(tensor: torch.Tensor) -> torch.Tensor:
    """Cast, once, to what autocast would cast it to at every use."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


@contextmanager
def _captured(decoder: nn.Module) -> Iterator[list[torch.Tensor]]:
    captured: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    try:
        yield captured
    finally:
        handle.remove()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype` on weights that stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, input_ids: torch.Tensor, scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well a model predicts some tokens of a batch.

    Args:
        model: any causal language model.
        input_ids: int64[batch, n], without padding.
        scored: bool[batch, n], the tokens to predict; the first of a row cannot be.

    Returns:
        `(log_probs, greedy)`: float32[m] and bool[m] on the CPU, for the m scored tokens row by row:
        natural log-likelihood, and whether the token is the model's first choice.
    """
    assert not scored[:, 0].any(), "nothing stands before the first token"
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    rows = last_hidden_states(model, inputs)[:, :-1][scored[:, 1:].to(model.device)]
    targets = inputs["input_ids"][:, 1:][scored[:, 1:].to(model.device)]
    head = model.get_output_embeddings()
    log_probs, greedy = [], []
    for start in range(0, len(rows), CHUNK_ROWS):
        logits = head(rows[start : start + CHUNK_ROWS]).float()
        picked = targets[start : start + CHUNK_ROWS]
        log_probs.append(logits.log_softmax(-1).gather(1, picked[:, None])[:, 0].cpu())
        greedy.append((logits.argmax(-1) == picked).cpu())
    return torch.cat(log_probs), torch.cat(greedy)
