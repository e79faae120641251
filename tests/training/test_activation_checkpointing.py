"""Activation checkpointing changes no gradient, and selective checkpointing repeats nothing that takes long."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from skipwise.models.attention import causal_attention, prefer_blocks
from skipwise.models.forward import autocast
from skipwise.training.activation_checkpointing import checkpoint_activations
from tests.picomodels import VOCABULARY, pico_llama

ATTENTION = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, causal_attention._opoverload)


class Calls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def one_step(model: PreTrainedModel, dtype: torch.dtype) -> tuple[torch.Tensor, Counter[Any]]:
    """Gradients, and what was computed for them."""
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24).expand(2, 24) + 9 * (torch.arange(24) >= 11)
    with Calls() as calls:
        with autocast(torch.device("cpu"), dtype):
            loss = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, labels=ids, use_cache=False
            ).loss
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), calls.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradients_without_doing_it_twice(dtype: torch.dtype) -> None:
    counts, gradients = {}, {}
    for mode in (None, "selective", "all"):
        model = pico_llama().train()
        prefer_blocks(model)
        if mode is not None:
            checkpoint_activations(model, mode)  # type: ignore[arg-type]
        gradients[mode], counts[mode] = one_step(model, dtype)
    for mode in ("selective", "all"):
        torch.testing.assert_close(gradients[mode], gradients[None], rtol=0, atol=0)
    layers = len(pico_llama().model.layers)
    matmuls = torch.ops.aten.mm.default
    assert counts["selective"][matmuls] == counts[None][matmuls]
    again = 6 * layers  # of seven; nothing needs what the last gives
    assert counts["all"][matmuls] == counts[None][matmuls] + again
    for mode, times in ((None, 1), ("selective", 1), ("all", 2)):
        assert sum(counts[mode][operator] for operator in ATTENTION) == times * layers
    cheap = torch.ops.aten.silu.default
    assert counts["selective"][cheap] == 2 * counts[None][cheap] == 2 * layers
