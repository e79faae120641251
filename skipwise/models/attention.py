"""Causal attention in blocks of plain matmuls, for CPUs that multiply bfloat16.

There PyTorch's own kernel runs at a third of the rate of matmuls, and under a mask it computes what the mask
hides. Whole products over a block of rows, with only the keys that these rows see, are faster. Blocks are small enough
that memory does not grow with the text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from skipwise.models.forward import in_compute_dtype

NAME = "skipwise_blocks"
# Attention that computes in float32, too; FlashAttention and its relatives do not.
IN_FLOAT32 = ("sdpa", "eager", "flex_attention", NAME)
# In float32 PyTorch's kernel is the faster one.
DTYPES = {torch.bfloat16}
# Rows of a block. Fewer make thin products, more compute above the diagonal.
BLOCK_ROWS = 128
# At most so many scores exist at once, in the backward pass unless a single row has more: 32 MiB, and three times that
# in training.
MOST_SCORES = 2**24
# Where a block of rows has more scores with all keys, so many keys at a time: thin products over long keys are slow.
BLOCK_KEYS = 1024


def prefer_blocks(model: PreTrainedModel) -> None:
    """Use it for what `sdpa` would have been used for, on a CPU; elsewhere nothing changes."""
    sparse = hasattr(model.config.get_text_config(), "index_topk")  # such families ask for `sdpa` by name
    hf = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
    if hf and not sparse and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


@contextmanager
def attention_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """For a while, attention that takes the float32 of weights in training where no autocast is on."""
    before = model.config._attn_implementation
    if before in IN_FLOAT32 or not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.library.custom_op("skipwise::causal_attention", mutates_args=())
def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale * Q K^T + mask) V; without a mask each row sees the keys up to its own, and the last row all keys.

    Products and scores are in the dtype of the inputs, sums of the softmax and of gradients over blocks in float32.
    One operator, so that compilers and selective checkpointing take it as a whole. Nothing as large as the scores is
    kept; the backward pass computes them again.

    Args:
        query: float[batch, heads, n, d].
        key: float[batch, key heads, m, d] with m >= n; heads share keys in groups, in order.
        value: float[batch, key heads, m, e].
        mask: bool[batch or 1, 1, n, m], true where a key is seen, or float, added to the scaled scores. It gets no
            gradient. A row that sees nothing weighs all keys alike.

    Returns:
        float[batch, n, heads, e]
    """
    out: torch.Tensor = _empty_out(query, key, value, scale, mask)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    whole = mask is not None or _all_keys_at_once(query, key.shape[2])
    size = _rows_at_once(query, key.shape[2] if whole else 2 * BLOCK_KEYS)
    for rows, seen in _blocks(query, key, size, mask):
        block = query[:, :, rows]
        scaled = _by_key(block * scale, key)
        if whole:
            mixed = torch.bmm(
                _shares(scaled, keys[:, seen], block.shape[2], _part(mask, rows, seen, query.dtype)), values[:, seen]
            )
        else:
            mixed = _mixed_by_blocks(scaled, keys[:, seen], values[:, seen], block.shape[2])
        out[:, rows] = mixed.view(*block.shape[:3], -1).transpose(1, 2)
    return out


@torch.library.custom_op("skipwise::causal_attention_backward", mutates_args=())
def _gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of queries, keys and values, block by block."""
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    grad_query = torch.empty_like(query)
    # By shape: copies of permuted heads would be permuted, too, and compilers are told otherwise.
    grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=key.device)
    grad_values = torch.zeros(values.shape, dtype=torch.float32, device=key.device)
    for rows, seen in _blocks(query, key, _rows_at_once(query, key.shape[2]), mask):
        block = query[:, :, rows]
        scaled = _by_key(block * scale, key)
        grad_block = _by_key(grad_out[:, rows].transpose(1, 2), key)
        shares = _shares(scaled, keys[:, seen], block.shape[2], _part(mask, rows, seen, query.dtype))
        grad_values[:, seen] += torch.bmm(shares.transpose(1, 2), grad_block)
        grad_shares = torch.bmm(grad_block, values[:, seen].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
        grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), scaled)
        grad_query[:, :, rows] = torch.bmm(grad_scores, keys[:, seen]).view_as(block) * scale
    return grad_query, grad_keys.to(key.dtype).view_as(key), grad_values.to(value.dtype).view_as(value)


@causal_attention.register_fake
def _empty_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    batch, heads, n, _ = query.shape
    return query.new_empty(batch, n, heads, value.shape[-1])


@_gradients.register_fake
def _empty_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, mask = inputs
    ctx.save_for_backward(*tensors, mask)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, mask = ctx.saved_tensors
    return *_gradients(grad_out, *tensors, ctx.scale, mask), None, None


causal_attention.register_autograd(_backward, setup_context=_keep)


def _rows_at_once(query: torch.Tensor, keys: int) -> int:
    """Rows of a block, of which each has a score with so many keys."""
    return max(1, min(BLOCK_ROWS, MOST_SCORES // (query.shape[0] * query.shape[1] * keys)))


def _all_keys_at_once(query: torch.Tensor, keys: int) -> bool:
    """Whether a block takes all of so many keys: where they are long, only few rows would fit, which is slow."""
    return _rows_at_once(query, keys) == BLOCK_ROWS or keys <= 2 * BLOCK_KEYS


def _blocks(
    query: torch.Tensor, key: torch.Tensor, size: int, mask: torch.Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """So many rows at a time, and the keys that they see: under a mask, from the first to the last of any row."""
    n, keys = query.shape[2], key.shape[2]
    visible = None if mask is None else _seen(mask).any(dim=0)[0]
    for start in range(0, n, size):
        end = min(start + size, n)
        if visible is None:
            yield slice(start, end), slice(0, keys - n + end)
        else:
            seen = visible[start:end].any(dim=0).nonzero()
            first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, keys - 1)
            yield slice(start, end), slice(first, last + 1)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask does not hide a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def _part(mask: torch.Tensor | None, rows: slice, seen: slice, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores of a block; finite, so that a row that sees nothing is no NaN."""
    if mask is None:
        return None
    part, lowest = mask[:, :, rows, seen], torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(part.shape, dtype=dtype, device=mask.device).masked_fill_(~part, lowest)
    return part.to(dtype).clamp(min=lowest)


def _by_key(block: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """float[batch, heads, rows, d] to float[batch * key heads, heads per key * rows, d]: one product per key head."""
    return block.reshape(key.shape[0] * key.shape[1], -1, block.shape[-1])


def _shares(scaled: torch.Tensor, keys: torch.Tensor, rows: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys under a mask.

    Without one the last `rows` of the keys are the rows' own, of which each sees those up to itself.
    """
    scores = torch.bmm(scaled, keys.transpose(1, 2))
    if mask is None:
        _hide_later(scores, rows)
    else:
        by_row = scores.view(len(mask), -1, rows, scores.shape[2])
        by_row += mask
    return scores.softmax(dim=-1)


def _hide_later(scores: torch.Tensor, rows: int) -> None:
    """In place, where the last `rows` of the keys are the rows' own."""
    later = torch.full((rows, rows), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    scores.view(len(scores), -1, rows, scores.shape[2])[..., -rows:] += later


def _mixed_by_blocks(scaled: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
    """Softmax over the keys times the values, with the largest score and the sum so far (arXiv 1805.02867).

    As in `_shares` the last `rows` of the keys are the rows' own; they are in the last block, which is larger.
    """
    total = keys.shape[1]
    begins = range(0, max(1, total - rows), BLOCK_KEYS)
    wide = torch.promote_types(scaled.dtype, torch.float32)
    largest = scaled.new_full((*scaled.shape[:2], 1), float("-inf"))
    weight = mixed = torch.zeros((), dtype=wide, device=scaled.device)
    for begin, end in zip(begins, (*begins[1:], total), strict=True):
        scores = torch.bmm(scaled, keys[:, begin:end].transpose(1, 2))
        if end == total:
            _hide_later(scores, rows)
        larger = torch.maximum(largest, scores.amax(-1, keepdim=True))
        faded = (largest.to(wide) - larger.to(wide)).exp()
        shares = scores.sub_(larger).exp_()
        weight = weight * faded + shares.sum(-1, keepdim=True, dtype=wide)
        mixed = mixed * faded + torch.bmm(shares, values[:, begin:end])
        largest = larger
    return (mixed / weight).to(values.dtype)


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
    """transformers' attention interface; what blocks cannot do goes to `sdpa`."""
    n, before = query.shape[2], key.shape[2] - query.shape[2]
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    takes_mask = causal if attention_mask is None else _takes(attention_mask, query, key)
    plain = takes_mask and not dropout and keywords.get("position_bias") is None
    query, key, value = in_compute_dtype(query), in_compute_dtype(key), in_compute_dtype(value)
    if plain and n > 1 and query.dtype in DTYPES and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            return causal_attention(query, key, value, scale, attention_mask), None
    if causal and attention_mask is None and n > 1 and before:  # sdpa would take the first keys for a row's own
        attention_mask = torch.ones(1, 1, n, before + n, dtype=torch.bool, device=query.device).tril(before)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
    )


def _takes(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether blocks do what this mask asks for, and fast."""
    n, keys = query.shape[2], key.shape[2]
    kind = mask.dtype == torch.bool or (mask.is_floating_point() and not mask.requires_grad)
    return kind and mask.shape[1:] == (1, n, keys) and _all_keys_at_once(query, keys)


def make_mask(**keywords: Any) -> torch.Tensor | None:
    """transformers' mask interface: none where blocks are used, on plain causal attention to all keys."""
    n, keys, padding = keywords["q_length"], keywords["kv_length"], keywords["attention_mask"]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else keywords["dtype"]
    blocks = dtype in DTYPES and torch.device(keywords["device"]).type == "cpu"
    plain = keywords["mask_function"] is causal_mask_function and keywords["allow_is_causal_skip"]
    all_keys = keywords["q_offset"] + n == keywords["kv_offset"] + keys
    if blocks and plain and all_keys and (padding is None or bool(padding.all())):
        return None
    # Without a mask `sdpa` takes the first keys for the rows' own, as in a static cache; `attend` takes the last.
    skip = keywords["allow_is_causal_skip"] and n in (1, keys)
    mask: torch.Tensor | None = sdpa_mask(**{**keywords, "allow_is_causal_skip": skip})
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
