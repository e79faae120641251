"""Layers that see only the last tokens: in a window with skips, those within a distance and not within an index.

transformers masks such layers by the index of tokens. Behind a skip they would attend across it, at distances that they
never meet later.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from skipwise.errors import UserError
from skipwise.models import attention
from skipwise.models.load import vocabulary_size
from skipwise.models.rope import text_config

FULL, WINDOWED = "full_attention", "sliding_attention"
# Attention that takes a mask of scores.
TAKES_MASKS = ("sdpa", "eager", attention.NAME)
Masks = torch.Tensor | dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Layers:
    """How far the layers of a model see.

    Attributes:
        window: a windowed layer sees keys at distances below it.
        windowed, total: how many layers are windowed, and how many there are.
        by_kind: whether the model takes a mask for each kind of layer, or one for all.
    """

    window: int
    windowed: int
    total: int
    by_kind: bool

    def describe(self) -> str:
        """For people, in one line."""
        if self.windowed == self.total:
            return (
                f"All {self.total} layers see only the last {self.window:,} tokens: what is farther away reaches one "
                "through several layers or not at all."
            )
        return (
            f"{self.windowed} of {self.total} layers see only the last {self.window:,} tokens; in windows with skips "
            "they are masked by distance."
        )


def windowed_layers(config: PreTrainedConfig, target: int) -> Layers | None:
    """The windowed layers of a model; None where none of them is shorter than the target.

    Raises:
        UserError: for layers that see only a part of the text in another way.
    """
    config = text_config(config)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    total = int(config.num_hidden_layers)
    if kinds is None:
        used = window is not None and getattr(config, "use_sliding_window", True)
        return Layers(int(window), total, total, False) if used and window is not None and window < target else None
    others = sorted(set(kinds) - {FULL, WINDOWED, "attention"})
    if others:
        raise UserError(
            f"Layers must see all of the text or its last tokens, but {config.model_type!r} has {', '.join(others)}, "
            "for which there is no mask by distance. Choose a model with full or sliding attention."
        )
    windowed = sum(kind == WINDOWED for kind in kinds)
    if not windowed or window is None or window >= target:
        return None
    return Layers(int(window), windowed, total, True)


def check_takes_masks(model: PreTrainedModel) -> None:
    """Raise `UserError` for an attention implementation that cannot be told what to hide."""
    implementation = model.config._attn_implementation
    if implementation not in TAKES_MASKS:
        raise UserError(
            f"Windowed layers must be masked by distance, which {implementation!r} attention does not take. Set "
            "model.attn_implementation=sdpa (or eager)."
        )


def masks_by_distance(
    layers: Layers, position_ids: torch.Tensor, attention_mask: torch.Tensor, eager: bool = False
) -> Masks:
    """What to give a model with windowed layers as `attention_mask`.

    Args:
        layers: which of them are windowed.
        position_ids: int64[batch, n], increasing along n.
        attention_mask: all ones, [batch, n]; or scores to add, float[batch, 1, n, n].
        eager: for an implementation that does not hide what comes later by itself.

    Returns:
        `attention_mask` itself where nothing is skipped; else float32[batch, 1, n, n] to add to scores, for all
        layers or for each kind (None: plain causal attention).
    """
    steps = position_ids.diff(dim=-1)
    scores = attention_mask.is_floating_point()
    if not scores and bool((steps == 1).all()):
        return attention_mask
    distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]
    hidden = (distance < 0) | (distance >= layers.window)
    causal = torch.zeros(distance.shape, device=distance.device).masked_fill(distance < 0, -torch.inf)
    full = attention_mask if scores else causal
    near = full.masked_fill(hidden, -torch.inf)
    if not layers.by_kind:
        return near
    return {FULL: full if scores or eager else None, WINDOWED: near}


@torch.no_grad()
def probe_windows(model: PreTrainedModel, layers: Layers) -> None:
    """Check, on the model itself, that its windowed layers take a mask by distance.

    Raises:
        UserError: when hiding what lies behind a far skip changes nothing.
    """
    n = 16
    ids = torch.randint(vocabulary_size(model), (1, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(n, device=model.device)[None]
    positions = positions + layers.window * (positions >= n // 2)
    ones = torch.ones_like(ids)
    masks = masks_by_distance(layers, positions, ones, model.config._attn_implementation == "eager")
    plain, masked = (
        model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[:, n // 2 :].float()
        for mask in (ones, masks)
    )
    if float((plain - masked).abs().max()) < 1e-6:
        raise UserError(
            f"Windowed layers must be masked by distance, but {type(model).__name__} takes no mask for them. Choose a "
            "model with full attention in every layer."
        )
