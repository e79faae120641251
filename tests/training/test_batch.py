"""The largest batch that fits."""

from collections.abc import Callable

import pytest
import torch

from skipwise.config import TrainConfig
from skipwise.errors import UserError
from skipwise.training.batch import step_on, with_fitting_batch
from tests.conftest import pico_llama
from tests.training.test_trainer import CPU


def room_for(windows: int, tried: list[int]) -> Callable[[int], None]:
    """A step that runs out of memory, as PyTorch says it, above so many windows."""

    def step(size: int) -> None:
        tried.append(size)
        if size > windows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return step


@pytest.mark.parametrize(
    ("wanted", "room", "fits", "tried"),
    [(8, 8, 8, [8]), (8, 5, 4, [8, 4]), (6, 5, 3, [6, 3]), (12, 1, 1, [12, 6, 4, 3, 2, 1]), (7, 6, 1, [7, 1])],
)
def test_as_many_windows_as_before_in_a_step(wanted: int, room: int, fits: int, tried: list[int]) -> None:
    config = TrainConfig(per_device_train_batch_size=wanted, gradient_accumulation_steps=2)
    sizes: list[int] = []
    found = with_fitting_batch(config, room_for(room, sizes), CPU)
    assert sizes == tried
    assert found.per_device_train_batch_size == fits
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 2 * wanted


def test_not_even_one() -> None:
    with pytest.raises(UserError, match="Not even one window fits"):
        with_fitting_batch(TrainConfig(per_device_train_batch_size=4), room_for(0, []), CPU)


def test_other_errors_are_not_hidden() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        with_fitting_batch(TrainConfig(), broken, CPU)


def test_a_step_is_tried_with_all_that_training_needs_and_changes_nothing() -> None:
    model = pico_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.eval()
    seen: list[tuple[tuple[int, ...], bool]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, _: seen.append((tuple(args[0].shape), module.training)))
    gradients: list[torch.Size] = []
    embedding.weight.register_hook(lambda gradient: gradients.append(gradient.shape))
    for echoes in (False, True):
        step_on(model, window=32, dtype=torch.float32, teacher=None, echoes=echoes)(3)
    assert seen == [((3, 32), True)] * 2
    assert gradients == [embedding.weight.shape] * 2
    assert not model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
