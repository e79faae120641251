"""What is done to a model, and what draws its windows, before it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skipwise import Lengths, LongRecipe, Mixed, Plain, PoSE, UserError, YaRN
from skipwise.training.config import TrainConfig
from skipwise.training.preparation import PROBE_PASSED, apply_settings, check_attention, window_collator

LENGTHS = Lengths(original=64, train=64, target=512)


def test_a_collator_has_what_sampler_and_scaling_need(tokenizer: PreTrainedTokenizerFast) -> None:
    """Seen to fail for each that was left out."""
    plain = window_collator(PoSE(), YaRN(), LENGTHS, tokenizer)
    assert not plain.whole_batches and plain.sentences is None and not plain.mark_text
    both = window_collator(
        LongRecipe(), Mixed(), LENGTHS, tokenizer, seed=3, untouched_share=0.1, echo_share=0.2, mark_text=True
    )
    assert both.whole_batches and both.sentences is not None and both.mark_text
    assert (both.seed, both.untouched_share, both.echo_share) == (3, 0.1, 0.2)


def only_itself(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *more: Any, **keywords: Any) -> Any:
    """Attention in which no token sees another."""
    size = query.shape[2]
    keywords["is_causal"] = False
    mask = torch.eye(size, dtype=torch.bool)[None, None]
    return sdpa_attention_forward(module, query, key, more[0], mask, *more[2:], **keywords)


def test_a_model_whose_attention_is_cut_is_refused(llama: PreTrainedModel) -> None:
    """Trap 2, in the state of training and back."""
    AttentionInterface.register("cut", only_itself)
    AttentionMaskInterface.register("cut", sdpa_mask)
    assert check_attention(llama, PoSE(), 512, [1], torch.float32) == [PROBE_PASSED] and not llama.training
    llama.set_attn_implementation("cut")
    with pytest.raises(UserError) as caught:
        check_attention(llama, PoSE(), 512, [1], torch.float32)
    assert caught.value.code == "skip_blocks_attention" and not llama.training


def test_settings_reach_the_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Activation checkpointing is on; kernels that need a GPU are left out, with a line."""
    config, lines = apply_settings(llama, TrainConfig(gradient_checkpointing="selective", use_liger_kernel=True))
    assert llama.is_gradient_checkpointing and not config.use_liger_kernel
    assert len(lines) == 1 and lines[0].startswith("train.use_liger_kernel")
    assert check_attention(llama, Plain(), 512, [1, 2], torch.float32) == [PROBE_PASSED]
