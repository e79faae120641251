"""Trap 1 and 2: attention across a skip, asked of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipwise import Lengths, PoSE, UserError, WindowCollator, probe_attention
from skipwise.models import attention
from skipwise.models.probe import probe_score_mask
from tests.picomodels import PICO_MODELS, pico_llama


@pytest.mark.parametrize("kind", PICO_MODELS)
@pytest.mark.parametrize("backend", ["eager", "sdpa", attention.NAME])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_the_probe_passes_with_a_mask_and_fails_without(
    kind: str, backend: str, batch_size: int, training: bool
) -> None:
    model = PICO_MODELS[kind]()
    model.set_attn_implementation(backend)
    model.train(training)
    dtype = torch.bfloat16 if backend == attention.NAME else torch.float32  # in which blocks are used
    probe_attention(model, 1024, batch_size, dtype=dtype)
    with pytest.raises(UserError, match=r"attention_mask.*WindowCollator"):
        probe_attention(model, 1024, batch_size, attention_mask=False, dtype=dtype)
    assert model.training is training


def test_the_probe_passes_with_gradient_checkpointing(llama: PreTrainedModel) -> None:
    llama.activation_checkpointing_enable()
    probe_attention(llama.train(), 1024, batch_size=2)
    assert llama.is_activation_checkpointing
    with pytest.raises(UserError, match="attention_mask"):
        probe_attention(llama, 1024, batch_size=2, attention_mask=False)


def test_the_probe_notices_a_model_that_ignores_positions(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.rotary_emb.inv_freq.zero_()
    with pytest.raises(UserError, match="ignores position_ids"):
        probe_attention(llama, 1024, batch_size=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("family", PICO_MODELS)
def test_masks_of_scores_work_on_stock_attention(family: str, implementation: str) -> None:
    """The probe is content, and no longer so when the same model is given a mask without its echoes."""
    model = PICO_MODELS[family]()
    model.set_attn_implementation(implementation)
    probe_score_mask(model)
    probe_score_mask(model, torch.bfloat16)

    def silence(module: torch.nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = keywords["attention_mask"]
        return args, {**keywords, "attention_mask": mask.clamp(max=0.0) if mask.dim() == 4 else mask}

    model.register_forward_pre_hook(silence, with_kwargs=True)
    with pytest.raises(UserError, match="echo_share"):
        probe_score_mask(model)


@pytest.mark.parametrize("instead", [lambda mask: None, lambda mask: mask.clamp(max=0.0), lambda mask: mask * 0.0])
def test_a_mask_of_scores_that_is_not_used_is_noticed(
    llama: PreTrainedModel, instead: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """No mask at all, only which keys are hidden, and nothing hidden."""

    def spoil(module: torch.nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = keywords["attention_mask"]
        return args, {**keywords, "attention_mask": instead(mask.nan_to_num(neginf=-1e9)) if mask.dim() == 4 else mask}

    llama.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(UserError, match="echo_share"):
        probe_score_mask(llama)


@pytest.mark.parametrize("echo_share", [0.0, 1.0])
def test_batches_of_the_collator_attend_across_the_skip(echo_share: float) -> None:
    """Trap 1. Seen to fail when `attention_mask` was removed from what `WindowCollator` returns."""
    model = pico_llama()
    lengths = Lengths(original=64, train=32, target=1024)
    tokens = torch.randint(2, 258, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    changed = [5 if tokens[0] != 5 else 6, *tokens[1:]]
    visit = {"visit": (0, 3, 0)}
    batch, other = (
        WindowCollator(PoSE(), lengths, echo_share=echo_share)([{"input_ids": ids, **visit}])
        for ids in (tokens, changed)
    )
    assert (batch["position_ids"].diff() > 1).any()
    difference = [
        model(**{k: v for k, v in b.items() if k != "labels"}, use_cache=False).logits[0, -1] for b in (batch, other)
    ]
    assert not torch.equal(*difference)
