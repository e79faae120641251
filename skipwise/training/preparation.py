"""Prepare a model for training on windows: kernels, activation checkpointing, the attention probe, the collator."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.data.sentences import sentences_of
from skipwise.data.windows import WindowCollator
from skipwise.lengths import Lengths
from skipwise.models.probe import probe_attention
from skipwise.models.windowed import check_windows
from skipwise.positions import PositionSampler
from skipwise.rope import RopeScaling
from skipwise.training.activation_checkpointing import checkpoint_activations
from skipwise.training.config import TrainConfig
from skipwise.training.kernels import usable_kernels, use_liger

PROBE_PASSED = "Attention probe passed: attention crosses skips and depends on their size."


def apply_settings(model: PreTrainedModel, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Change the model as settings of training ask: fused kernels and activation checkpointing.

    Returns:
        The settings without those that this machine or model cannot follow, and a line about each of these.
    """
    config, lines = usable_kernels(config, model, model.device)
    if config.use_liger_kernel:
        use_liger(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model, "selective" if config.gradient_checkpointing == "selective" else "all")
    return config, lines


def check_attention(
    model: PreTrainedModel, sampler: PositionSampler, target: int, batches: Iterable[int], dtype: torch.dtype
) -> list[str]:
    """Probe the attention of a model as it is while training.

    Args:
        model: model with the RoPE, kernels and adapters of the training.
        sampler: position sampler of the training.
        target: target length, in tokens.
        batches: sizes of batches to probe.
        dtype: compute dtype.

    Returns:
        Lines about the result.

    Raises:
        UserError: when attention does not cross a skip, or does not depend on its size.
    """
    was_training = model.training
    model.train()
    try:
        for batch in batches:
            probe_attention(model, target, batch, dtype=dtype)
        layers = check_windows(model, target, dtype) if sampler.has_skips else None
    finally:
        model.train(was_training)
    return [PROBE_PASSED, *([] if layers is None else [layers.describe()])]


def window_collator(
    sampler: PositionSampler,
    scaling: RopeScaling,
    lengths: Lengths,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    untouched_share: float = 0.0,
    echo_share: float = 0.0,
    mark_text: bool = False,
) -> WindowCollator:
    """Collator for a sampler and a RoPE scaling, with what these need.

    Args:
        sampler: position sampler.
        scaling: RoPE scaling of the model.
        lengths: original, train and target length.
        tokenizer: tokenizer of the model.
        seed, untouched_share, echo_share, mark_text: as for `WindowCollator`.
    """
    return WindowCollator(
        sampler,
        lengths,
        seed,
        untouched_share,
        echo_share,
        mark_text,
        whole_batches=scaling.two_tables,
        sentences=sentences_of(tokenizer) if sampler.needs_sentences else None,
    )
