"""Try a training step without changing anything."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size
from skipwise.training.trainer import Teacher, window_loss
from skipwise.utils.distributed import world_size


def step_on(
    model: PreTrainedModel,
    window: int,
    dtype: torch.dtype,
    teacher: Teacher | None,
    skips: bool = True,
    echoes: bool = False,
) -> Callable[[int], None]:
    """A function that does what a training step of a batch does, but changes nothing.

    Args:
        model: with what is trained in it marked so.
        window: tokens of one.
        dtype: compute dtype.
        teacher: that training will have.
        skips: whether positions have skips, for which layers with windows need a mask.
        echoes: whether windows come with a mask of attention scores.
    """

    def step(size: int) -> None:
        """Forward and backward pass of so many windows, with as much memory set aside as training will hold."""
        ids = torch.randint(vocabulary_size(model), (size, window), device=model.device)
        inputs = {"input_ids": ids, "labels": ids, "text_runs_on": torch.ones_like(ids)}
        positions = torch.arange(window, device=model.device)
        inputs["position_ids"] = (positions + skips * (positions >= window // 2)).expand_as(ids)
        inputs["attention_mask"] = torch.ones_like(ids)
        if echoes:
            inputs["attention_mask"] = torch.full((size, 1, window, window), -torch.inf, device=model.device).triu(1)
        # Both moments, and with several processes the buckets in which gradients travel.
        copies = 2 if world_size() == 1 else 3
        held = [torch.empty(copies, *weight.shape, device=weight.device) for weight in _trained(model)]
        mode = model.training
        model.train()
        try:
            with autocast(model.device, dtype):
                loss = window_loss(model, model, inputs, teacher)
            loss.backward()
        finally:
            model.zero_grad(set_to_none=True)
            model.train(mode)
            del held

    return step


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]
