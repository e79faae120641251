"""A training step that is only tried."""

import torch

from skipwise.training.trial import step_on
from tests.picomodels import pico_llama


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
