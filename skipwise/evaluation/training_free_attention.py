"""Training-free methods to read beyond the window, as attention functions of Hugging Face models.

They get queries and keys that are rotated already. Rotations add up, so another position is one more rotation, by the
difference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from skipwise.errors import UserError
from skipwise.evaluation.training_free import TrainingFree
from skipwise.models.load import vocabulary_size
from skipwise.models.rope import is_rotary_table, length_dependent, read_rope, table_of, text_config
from skipwise.models.windowed import windowed_layers
from skipwise.models.windows import full_table
from skipwise.utils.files import short_hash

# Rows whose scores exist at a time.
ROWS = 128
# Tokens of a block of the memory; first tokens that every token sees.
BLOCK, SINKS = 64, 4
# Name of attention that looks at keys; by how many tokens it moves them.
CAPTURE, MOVED = "skipwise_capture", 7
# Scores of the rows [start, stop) of all texts over all keys: float[batch, heads, rows, m].
Scores = Callable[["Turned", int, int], torch.Tensor]


class Turned:
    """Queries and keys of one call, at their positions and at others.

    Args:
        query: float[batch, heads, n, d], rotated; the last n of m tokens.
        key: float[batch, heads, m, d], rotated.
        frequencies: float32[r / 2], of the r dimensions that are rotated.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, frequencies: torch.Tensor, scale: float) -> None:
        self.query, self.key, self.frequencies, self.scale = query, key, frequencies, scale
        self.keys_at = torch.arange(key.shape[2], device=key.device)
        self.queries_at = self.keys_at[key.shape[2] - query.shape[2] :]

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of some rows, and their positions."""
        return self.query[:, :, start:stop], self.queries_at[start:stop]

    def moved(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """float[batch, heads, k, d]: x with its k positions changed by int64[k]."""
        angles = by.float()[:, None] * self.frequencies
        cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
        size = cos.shape[-1]
        turned, rest = x[..., :size].float(), x[..., size:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def product(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scaled scores, in float32."""
        return (query @ key.transpose(-1, -2)).float() * self.scale


def check_training_free(config: PreTrainedConfig, training_free: TrainingFree) -> None:
    """Raise `UserError` for a model that a training-free method is not for, by its config."""
    info, config = read_rope(config), text_config(config)
    if full_table(config.rope_parameters) is not config.rope_parameters:
        raise UserError(
            f"Method {training_free.name} needs one rotary table for all layers; {config.model_type!r} has several.",
            code="method_needs_single_table",
        )
    if length_dependent(config) is not None or (training_free.name == "dynamic-ntk" and info.rope_type != "default"):
        raise UserError(
            f"Method {training_free.name} would change a RoPE of type {info.rope_type!r}, which has its own way beyond "
            "the window. Leave it out for this model.",
            code="method_conflicts_with_rope",
        )
    near = windowed_layers(config, info.current)
    if training_free.name != "dynamic-ntk" and (near is not None or getattr(config, "attn_logit_softcapping", None)):
        raise UserError(
            f"Method {training_free.name} needs plain attention in all layers, which {config.model_type!r} has not.",
            code="method_needs_plain_attention",
        )
    if training_free.name == "sinks" and (training_free.number or 0) > info.current - SINKS:
        raise UserError(
            f"sinks:N is at most the window less {SINKS}, {info.current - SINKS:,}, not {training_free.number:,}.",
            code="sinks_exceed_window",
        )


def use_training_free(model: PreTrainedModel, training_free: TrainingFree) -> None:
    """Read texts beyond the window with a training-free method from here on, in place.

    Raises:
        UserError: for a model whose attention is of another kind.
    """
    check_training_free(model.config, training_free)
    if training_free.name == "dynamic-ntk":
        _use_dynamic_ntk(model)
        return
    window = read_rope(model.config).current
    tables = [module for module in model.modules() if is_rotary_table(module)]
    if not tables or not model._can_set_attn_implementation():
        raise UserError(
            f"Method {training_free.name} is not for {model.config.model_type!r}, whose attention cannot be set.",
            code="attention_cannot_be_set",
        )
    frequencies = torch.from_numpy(table_of(tables[0], window, None)[0]).float()
    _check_rotation(model, frequencies)
    # Others may have other frequencies under the same number.
    name = f"skipwise_{training_free.name}_{training_free.number}_{window}_{short_hash(str(frequencies.tolist()))}"
    AttentionInterface.register(name, partial(_attend, _scores_of(training_free, window), frequencies))
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)


@torch.no_grad()
def _check_rotation(model: PreTrainedModel, frequencies: torch.Tensor) -> None:
    """Ask every layer whether a key that moves by some tokens is one more rotation of its first dimensions, in halves.

    Raises:
        UserError: for families that rotate neighbours or other dimensions, or have layers without positions.
    """
    before = model.config._attn_implementation
    keys: list[torch.Tensor] = []

    def capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        """Plain attention, with an eye on the keys."""
        keys.append(key)
        return sdpa_attention_forward(module, query, key, *rest, **keywords)

    AttentionInterface.register(CAPTURE, capture)
    AttentionMaskInterface.register(CAPTURE, _no_mask)
    model.set_attn_implementation(CAPTURE)
    try:
        ids = torch.arange(1, 9, device=model.device)[None] % vocabulary_size(model)
        ones, at = torch.ones_like(ids), torch.arange(ids.shape[1], device=model.device)
        for start in (0, MOVED):
            model(input_ids=ids, attention_mask=ones, position_ids=(at + start)[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
    half = len(keys) // 2
    for here, there in zip(keys[:half], keys[half:], strict=True):
        turned = Turned(here, here, frequencies.to(here.device), 1.0)
        moved = turned.moved(here, torch.full_like(at, MOVED))
        if float((moved - there).norm()) > 0.05 * float(there.norm()):
            raise UserError(
                "Training-free methods move keys by rotating the first dimensions of a head in halves; "
                f"{model.config.model_type!r} "
                "has layers that do something else. Choose another model.",
                code="aid_needs_half_rotation",
            )


def _no_mask(**keywords: Any) -> None:
    """transformers' mask interface: what is later is hidden by the attention itself."""
    mask = keywords.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise UserError(
            "Models with a training-free method read one text at a time, without padding. Set the batch size to 1.",
            code="aid_needs_single_text",
        )


def _use_dynamic_ntk(model: PreTrainedModel) -> None:
    """transformers' own type, with a factor of 1: theta grows with the length of the text over the window."""
    config = text_config(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 1.0}
    for name, module in list(model.named_modules()):
        if is_rotary_table(module):
            model.set_submodule(name, type(module)(config=config).to(model.device))


def _scores_of(training_free: TrainingFree, window: int) -> Scores:
    if training_free.name == "self-extend":
        return partial(grouped_scores, near=window // 2, group=training_free.number or 8)
    recent = (
        min(training_free.number or window - SINKS, window - SINKS) if training_free.name == "sinks" else window // 2
    )
    return partial(
        recent_scores, recent=recent, blocks=(training_free.number or 16) if training_free.name == "memory" else 0
    )


def _attend(
    scores: Scores,
    frequencies: torch.Tensor,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: softmax of these scores, rows at a time, each over the keys up to its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    turned = Turned(query, key, frequencies.to(query.device), scale)
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=value.dtype, device=value.device)
    for start in range(0, query.shape[2], ROWS):
        stop = min(start + ROWS, query.shape[2])
        later = turned.keys_at > turned.queries_at[start:stop, None]
        shares = scores(turned, start, stop).masked_fill(later, -torch.inf).softmax(-1)
        out[:, :, start:stop] = shares.to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


def grouped_scores(turned: Turned, start: int, stop: int, *, near: int, group: int) -> torch.Tensor:
    """Self-Extend: ordinary positions up to a distance of `near`, beyond it positions divided by `group`.

    Far queries are moved so that both parts meet at that distance (arXiv 2401.01325, Section 3.2).
    """
    query, at = turned.rows(start, stop)
    far_query = turned.moved(query, at // group + near - near // group - at)
    far_key = turned.moved(turned.key, turned.keys_at // group - turned.keys_at)
    far = at[:, None] - turned.keys_at >= near
    return torch.where(far, turned.product(far_query, far_key), turned.product(query, turned.key))


def recent_scores(turned: Turned, start: int, stop: int, *, recent: int, blocks: int) -> torch.Tensor:
    """The first tokens and the `recent` last ones, and of what lies between some blocks, or nothing.

    What is farther than `recent` counts as that far away. The blocks are those whose mean key is most like the query,
    both without positions; each token and head has its own. Tokens that are not yet in a whole block are seen as well.
    """
    query, at = turned.rows(start, stop)
    keys_at = turned.keys_at
    distance = at[:, None] - keys_at
    without = turned.moved(turned.key, -keys_at)
    there = turned.product(turned.moved(query, recent - at), without)
    scores = torch.where(distance < recent, turned.product(query, turned.key), there)
    seen = (distance < recent) | (keys_at < SINKS)
    whole = int((at[-1] - recent + 1).clamp(min=0)) // BLOCK
    if not blocks or not whole:
        return scores.masked_fill(~seen, -torch.inf)
    behind = (at - recent + 1).clamp(min=0) // BLOCK  # of each token, blocks that are farther away
    means = without[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).mean(3)
    likeness = turned.product(turned.moved(query, -at), means)
    likeness = likeness.masked_fill(torch.arange(whole, device=at.device) >= behind[:, None], -torch.inf)
    best = likeness.topk(min(blocks, whole), dim=-1)
    chosen = torch.zeros_like(likeness, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)
    remembered = torch.zeros(*likeness.shape[:3], len(keys_at), dtype=torch.bool, device=at.device)
    remembered[..., : whole * BLOCK] = chosen.repeat_interleave(BLOCK, dim=-1)
    return scores.masked_fill(~(seen | remembered | (keys_at >= (behind * BLOCK)[:, None])), -torch.inf)
