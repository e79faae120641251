"""Causal attention in blocks of plain matrix products, for CPUs.

There PyTorch's own kernel runs at a third of the rate of matrix products, and under a mask it computes what the mask
hides. Whole products over a block of rows, with only the keys that these rows see, need neither a mask nor more memory.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from skipwise.models.forward import for_products

NAME = "skipwise_blocks"
# In float32 PyTorch's kernel is the faster one.
DTYPES = {torch.bfloat16}
# Rows of a block. Fewer make thin products, more compute above the diagonal.
BLOCK_ROWS = 128


def prefer_blocks(model: PreTrainedModel) -> None:
    """Use it for what `sdpa` would have been used for, on a CPU; elsewhere nothing changes."""
    if (
        model.device.type == "cpu"
        and model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(NAME)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * Q K^T) V, each row over the keys up to its own; the last row sees all of them.

    Products and scores are in the dtype of the inputs, sums of the softmax and of gradients over blocks in float32.

    Args:
        query: float[batch, heads, n, d].
        key: float[batch, key heads, m, d] with m >= n; heads share keys in groups, in order.
        value: float[batch, key heads, m, e].

    Returns:
        float[batch, n, heads, e]
    """
    return _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Nothing as large as the scores is kept; `backward` computes them again."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        batch, heads, n, _ = query.shape
        before = key.shape[2] - n
        out = query.new_empty(batch, n, heads, value.shape[-1])
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        for start in range(0, n, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            seen = slice(0, before + min(start + BLOCK_ROWS, n))
            block = query[:, :, rows]
            shares = _shares(_by_key(block * scale, key), keys[:, seen], block.shape[2])
            out[:, rows] = torch.bmm(shares, values[:, seen]).view(*block.shape[:3], -1).transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Block by block, as forward."""
        query, key, value = ctx.saved_tensors
        n = query.shape[2]
        before = key.shape[2] - n
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_keys = torch.zeros_like(keys, dtype=torch.float32)
        grad_values = torch.zeros_like(values, dtype=torch.float32)
        for start in range(0, n, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            seen = slice(0, before + min(start + BLOCK_ROWS, n))
            block = query[:, :, rows]
            scaled = _by_key(block * ctx.scale, key)
            grad_block = _by_key(grad_out[:, rows].transpose(1, 2), key)
            shares = _shares(scaled, keys[:, seen], block.shape[2])
            grad_values[:, seen] += torch.bmm(shares.transpose(1, 2), grad_block)
            grad_shares = torch.bmm(grad_block, values[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), scaled)
            grad_query[:, :, rows] = torch.bmm(grad_scores, keys[:, seen]).view_as(block) * ctx.scale
        return grad_query, grad_keys.to(key.dtype).view_as(key), grad_values.to(value.dtype).view_as(value), None


def _by_key(block: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """float[batch, heads, rows, d] to float[batch * key heads, heads per key * rows, d]: one product per key head."""
    return block.reshape(key.shape[0] * key.shape[1], -1, block.shape[-1])


def _shares(scaled: torch.Tensor, keys: torch.Tensor, rows: int) -> torch.Tensor:
    """Softmax over the keys; the last `rows` of them are the rows' own, of which each sees those up to itself."""
    scores = torch.bmm(scaled, keys.transpose(1, 2))
    later = torch.full((rows, rows), float("-inf"), dtype=scores.dtype).triu(1)
    scores.view(len(keys), -1, rows, keys.shape[1])[..., -rows:] += later
    return scores.softmax(dim=-1)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; what is not plainly causal goes to `sdpa`."""
    n, before = query.shape[2], key.shape[2] - query.shape[2]
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = causal and attention_mask is None and not dropout and keywords.get("position_bias") is None
    query, key, value = for_products(query), for_products(key), for_products(value)
    if plain and n > 1 and query.dtype in DTYPES:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            return causal_attention(query, key, value, scale), None
    if causal and attention_mask is None and n > 1 and before:  # sdpa would take the first keys for a row's own
        attention_mask = torch.ones(1, 1, n, before + n, dtype=torch.bool).tril(before)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
    )


def make_mask(**keywords: Any) -> torch.Tensor | None:
    """transformers' mask interface: none for plain causal attention to all keys, without padding."""
    padding = keywords["attention_mask"]
    plain = keywords["mask_function"] is causal_mask_function and keywords["allow_is_causal_skip"]
    all_keys = keywords["q_offset"] + keywords["q_length"] == keywords["kv_offset"] + keywords["kv_length"]
    if plain and all_keys and (padding is None or bool(padding.all())):
        return None
    mask: torch.Tensor | None = sdpa_mask(**keywords)
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
