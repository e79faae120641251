"""Layers that see only the last tokens: in a window with skips, those within a distance and not within an index.

In an encoder they are those near by, on both sides. transformers masks such layers by the index of tokens. Behind a
skip they would attend across it, at distances that they never meet later.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from skipwise.errors import UserError
from skipwise.models import attention
from skipwise.models.forward import autocast, in_compute_dtype
from skipwise.models.load import vocabulary_size
from skipwise.models.rope import text_config
from skipwise.models.shape import knows_key
from skipwise.models.windows import FULL, ORIGINAL, SLIDING, full_table

# Attention that takes a mask of scores.
TAKES_MASKS = ("sdpa", "eager", attention.NAME)
Masks = torch.Tensor | dict[str, torch.Tensor | None]
# What layers do that neither position ids nor a mask by distance reach.
_STATE = "carry a state from token to token, across every skip"
_OTHER_LAYERS = {
    "linear_attention": _STATE,
    "conv": _STATE,
    "hybrid": _STATE,
    "mamba": _STATE,
    "chunked_attention": "see the chunk of their token, cut by index",
    "indexed_attention": "choose their keys by content",
}
# Of a mask, at a time.
ROWS = 1024
# Rounding of logits is smaller.
LEAST_CHANGE = 1e-6


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
        used = knows_key(type(config), "sliding_window") and getattr(config, "use_sliding_window", True)
        return Layers(int(window), total, total, False) if used and window is not None and window < target else None
    others = sorted(set(kinds) - {FULL, SLIDING, "attention"})
    if others:
        reasons = dict.fromkeys(_OTHER_LAYERS.get(kind, "are not known") for kind in others)
        raise UserError(
            f"Layers must see all of the text or its last tokens, but {config.model_type!r} has others "
            f"({', '.join(others)}), which {' or '.join(reasons)}. Choose a model with full or sliding attention.",
            code="layer_type_not_supported",
        )
    windowed = sum(kind == SLIDING for kind in kinds)
    if not windowed or window is None or window >= target:
        return None
    return Layers(int(window), windowed, total, True)


def check_takes_masks(model: PreTrainedModel) -> None:
    """Raise `UserError` for an attention implementation that cannot be told what to hide."""
    implementation = model.config._attn_implementation
    if implementation not in TAKES_MASKS:
        raise UserError(
            f"Windowed layers must be masked by distance, which {implementation!r} attention does not take. Set "
            "model.attn_implementation=sdpa (or eager).",
            code="distance_mask_not_supported",
        )


def check_windows(model: PreTrainedModel, target: int, dtype: torch.dtype = torch.float32) -> Layers | None:
    """The windowed layers of a model, if there are any, after asking it for what windows with skips need of them.

    Args:
        model: as it will be trained.
        target: target length, in tokens.
        dtype: compute dtype of the training.

    Raises:
        UserError: when they cannot be masked by distance.
    """
    layers = windowed_layers(model.config, target)
    if layers is not None:
        check_takes_masks(model)
        probe_windows(model, layers, dtype)
    return layers


def masks_for(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Masks:
    """What to give a model as `attention_mask` in training, in the compute dtype.

    The halves of an encoder-decoder have masks of their own: `attention_mask=masks_for(model.model.encoder, ...)`,
    and `decoder_attention_mask` likewise.

    Args:
        model: with its target length in its config.
        inputs: `attention_mask`: all ones, [batch, n], or scores to add, float[batch, 1, n, n]; and `position_ids`,
            int64[batch, n], increasing along n. Without these there are no skips.

    Raises:
        UserError: for both halves at once.

    Returns:
        `attention_mask` itself where nothing is skipped or no layer is windowed; else a mask for all layers, or one for
        each kind (None: plain attention to all, or to all before).
    """
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "lm_head"):
        raise UserError(
            "The halves of an encoder-decoder have masks of their own, but masks_for got the whole model. Give it "
            "model.model.encoder and model.model.decoder, each with its own position_ids.",
            code="encoder_decoder_not_split",
        )
    given = inputs["attention_mask"]
    layers = windowed_layers(model.config, text_config(model.config).max_position_embeddings)
    positions = inputs.get("position_ids")
    _check_one_table(model, positions)
    if layers is None or positions is None or not bool((positions.diff(dim=-1) != 1).any()):
        return in_compute_dtype(given) if given.is_floating_point() else given
    both_ways = sees_both_ways(model)
    near = sliding_keys(positions, layers.window, both_ways)
    full: torch.Tensor | None
    if given.is_floating_point():
        full, windowed = in_compute_dtype(given), in_compute_dtype(given.masked_fill(~near, -torch.inf))
    elif model.config._attn_implementation != "eager":
        full, windowed = None, near
    else:  # which takes scores alone, and for an encoder none: a decoder's tokens may look at the same text
        n = positions.shape[-1]
        scores = torch.zeros(len(positions), 1, n, n, device=positions.device)
        if not both_ways:
            scores = torch.full_like(scores, -torch.inf).triu(1)
        full = None if both_ways else in_compute_dtype(scores)
        windowed = in_compute_dtype(scores.masked_fill(~near, -torch.inf))
    return {FULL: full, SLIDING: windowed} if layers.by_kind else windowed


def _check_one_table(model: PreTrainedModel, positions: torch.Tensor | None) -> None:
    """Refuse a batch that would need two rotary tables: with two lists of factors (`mixed`) the longest window of a
    batch decides for all, and the others are read with frequencies that they are never read with later.
    """
    rope = full_table(getattr(text_config(model.config), "rope_parameters", None) or {})
    if positions is None or rope.get("rope_type") != "longrope" or rope.get("short_factor") == rope.get("long_factor"):
        return
    beyond = positions.amax(dim=-1) >= int(rope[ORIGINAL])
    if bool(beyond.any()) and not bool(beyond.all()):
        raise UserError(
            f"This model has other frequencies beyond {int(rope[ORIGINAL]):,} tokens, and {int(beyond.sum())} of the "
            f"{len(beyond)} windows of a batch reach there: the others would get them, too. Give WindowCollator "
            "whole_batches=True.",
            code="batch_needs_two_tables",
        )


def sees_both_ways(model: PreTrainedModel) -> bool:
    """Whether a model is an encoder, whose tokens see what comes after them as well.

    A decoder may hold attention that is not causal beside its own: a tower for images, or to the text of an encoder.
    """
    return {module.is_causal for module in model.modules() if hasattr(module, "is_causal")} == {False}


def sliding_keys(position_ids: torch.Tensor, window: int, both_ways: bool = False) -> torch.Tensor:
    """bool[batch, 1, n, n]: of each token, which ones a windowed layer sees, itself included.

    Args:
        position_ids: int64[batch, n].
        window: distances below it are seen; in an encoder, to both sides, those up to it.
        both_ways: whether it is one.
    """
    batch, n = position_ids.shape
    near = torch.empty(batch, 1, n, n, dtype=torch.bool, device=position_ids.device)
    keys = position_ids.int()[:, None, None, :]
    for rows in torch.arange(n, device=position_ids.device).split(ROWS):  # distances are four times as large
        distance = position_ids.int()[:, None, rows, None] - keys
        near[:, :, rows] = distance.abs() <= window if both_ways else (distance >= 0) & (distance < window)
    return near


@torch.no_grad()
def probe_windows(model: PreTrainedModel, layers: Layers, dtype: torch.dtype = torch.float32) -> None:
    """Check, on the model itself, that its windowed layers take a mask by distance.

    Args:
        model: its mode is kept.
        layers: of it.
        dtype: compute dtype of the training.

    Raises:
        UserError: when hiding what lies behind a far skip changes nothing, or not enough.
    """
    n, half = 16, 8
    ids = torch.randint(vocabulary_size(model), (1, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    other = ids.clone()
    other[:, half - 1] = (other[:, half - 1] + 1) % vocabulary_size(model)
    positions = torch.arange(n, device=model.device)[None]
    positions = positions + layers.window * (positions >= half)
    ones = torch.ones_like(ids)

    def behind(tokens: torch.Tensor, mask: Masks) -> torch.Tensor:
        """Logits of the tokens behind the skip."""
        logits: torch.Tensor = model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        return logits[:, half:].float()

    mode = model.training
    model.eval()  # no dropout, whose draws differ
    try:
        with autocast(model.device, dtype):
            masks = masks_for(model, {"attention_mask": ones, "position_ids": positions})
            masked = behind(ids, masks)
            taken = float((behind(ids, ones) - masked).abs().max()) > LEAST_CHANGE
            blind = float((behind(other, masks) - masked).abs().max()) < LEAST_CHANGE
    except (TypeError, ValueError, AttributeError) as error:  # of a forward pass that expects something else
        raise UserError(
            f"{type(model).__name__} takes no mask for its windowed layers: {error}", code="distance_mask_not_supported"
        ) from error
    finally:
        model.train(mode)
    if not taken or (layers.windowed == layers.total and not blind):
        raise UserError(
            f"Windowed layers must be masked by distance, but {type(model).__name__} takes no mask for them. Choose a "
            "model with full attention in every layer.",
            code="distance_mask_not_supported",
        )
