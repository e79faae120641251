"""Options for other machines: left out with one line where they cannot be had, and taken back after training."""

import importlib.util

import pytest
import torch
from pydantic import ValidationError

from skipwise.config import ModelConfig, TrainConfig
from skipwise.models import speedups
from skipwise.models.speedups import compiled_layers, usable_attention, usable_speedups
from tests.conftest import VOCABULARY, pico_llama

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def broken(*_: object, **__: object) -> object:
    raise RuntimeError("No working C++ compiler\nmore about it")


def test_what_a_cpu_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    model, lines = usable_attention(ModelConfig(path="x", attn_implementation="flash_attention_2"), CPU)
    train, more = usable_speedups(TrainConfig(use_liger_kernel=True, torch_compile=True), CPU)
    assert (model.attn_implementation, train.use_liger_kernel, train.torch_compile) == (None, False, False)
    assert [line.split()[0].rstrip(":") for line in lines + more] == [
        "model.attn_implementation",
        "train.use_liger_kernel",
        "train.torch_compile",
    ]
    assert "No working C++ compiler" in more[1] and "\n" not in more[1]


@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_needs_the_packages(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    model, lines = usable_attention(ModelConfig(path="x", attn_implementation="flash_attention_3"), GPU)
    train, more = usable_speedups(TrainConfig(use_liger_kernel=True), GPU)
    assert model.attn_implementation == ("flash_attention_3" if there else None)
    assert train.use_liger_kernel == there
    assert len(lines + more) == (0 if there else 2)


def test_what_was_not_asked_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    given = ModelConfig(path="x", attn_implementation="sdpa"), TrainConfig()
    assert usable_attention(given[0], CPU) == (given[0], [])
    assert usable_speedups(given[1], CPU) == (given[1], [])


def test_compiling_and_choosing_what_is_kept_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="Leave one of them out"):
        TrainConfig(torch_compile=True, gradient_checkpointing="selective")


def test_layers_are_compiled_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that counts stands for the real one, which needs a compiler."""
    ran = 0

    def counting(function: object, **_: object) -> object:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal ran
            ran += 1
            return function(*arguments, **keywords)  # type: ignore[operator]

        return call

    monkeypatch.setattr(torch, "compile", counting)
    model = pico_llama()
    ids = torch.randint(2, VOCABULARY, (1, 8))
    expected = model(ids).logits
    with compiled_layers(model):
        torch.testing.assert_close(model(ids).logits, expected)
    assert ran == len(model.model.layers)
    model(ids)
    assert ran == len(model.model.layers)


def test_a_real_compiler_agrees() -> None:
    """Where there is one."""
    if speedups._cannot_compile(CPU):
        pytest.skip("no compiler")
    model = pico_llama().train()
    ids = torch.randint(2, VOCABULARY, (1, 8))
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            with compiled_layers(model):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
