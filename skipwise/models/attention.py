"""Attention of a piece of text to what stands before it, without a mask.

PyTorch's CPU kernel computes what a mask hides. A causal piece needs none: it sees all that stands before it, and
itself causally. Two unmasked calls, merged by their log-sum-exps, give the same sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "skipwise_pieces"

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextmanager
def attention_in_pieces(model: PreTrainedModel) -> Iterator[None]:
    """Read pieces of a text with two unmasked calls; only on a CPU, and only where `sdpa` would have been used."""
    known = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
    if not (known and model._can_set_attn_implementation()):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: float[batch, heads, n, d] to float[batch, n, heads, d].

    Args:
        key: float[batch, key heads, n', d], with n' >= n.
        attention_mask: none for a causal piece; windowed layers and the like bring one.
    """
    n, before = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and before and value.shape[-1] != query.shape[-1]:  # not for this kernel
        attention_mask = torch.ones(1, 1, n, before + n, dtype=torch.bool).tril(before)
    if attention_mask is not None or before == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    earlier, their_sums = _kernel(query, key[:, :, :before], value[:, :, :before], scale=scaling)
    own, own_sums = _kernel(query, key[:, :, before:], value[:, :, before:], is_causal=True, scale=scaling)
    share = torch.sigmoid(own_sums - their_sums)[..., None].to(own.dtype)
    return torch.lerp(earlier, own, share).transpose(1, 2).contiguous(), None


def make_mask(**keywords: Any) -> torch.Tensor | None:
    """transformers' mask interface: none for a plain causal piece without padding."""
    padding = keywords["attention_mask"]
    if keywords["mask_function"] is causal_mask_function and (padding is None or bool(padding.all())):
        return None
    mask: torch.Tensor | None = sdpa_mask(**keywords)
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
