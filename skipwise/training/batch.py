"""The largest batch that fits into a device's memory."""

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size
from torch import nn
from transformers import PreTrainedModel

from skipwise.config import TrainConfig
from skipwise.errors import UserError
from skipwise.models.forward import autocast
from skipwise.models.load import vocabulary_size
from skipwise.ranks import smallest_of, world_size
from skipwise.training.trainer import Teacher, window_loss


def with_fitting_batch(config: TrainConfig, try_step: Callable[[int], None], device: torch.device) -> TrainConfig:
    """The configuration with the largest batch for which a step can be tried, and as many windows in a step as before.

    Sizes are the divisors of the one that is asked for. With several processes all take the smallest of theirs.

    Raises:
        UserError: when not even one window fits.
    """
    wanted = config.per_device_train_batch_size
    smaller = iter([size for size in range(wanted - 1, 0, -1) if wanted % size == 0])

    def attempt(size: int) -> int:
        try_step(size)
        return size

    search = find_executable_batch_size(
        attempt, starting_batch_size=wanted, reduce_batch_size_fn=lambda: next(smaller, 0)
    )
    try:
        fits = search()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        fits = 0
    fits = smallest_of(fits, device)
    if not fits:
        raise UserError(
            "Not even one window fits into the memory of a device. Lower --train-length, set "
            "train.gradient_checkpointing or train.lora, or shard the model (train.fsdp, train.deepspeed).",
            code="out_of_memory",
        )
    return config.model_copy(
        update={
            "per_device_train_batch_size": fits,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * (wanted // fits),
        }
    )


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
        dtype: of matrix products.
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
