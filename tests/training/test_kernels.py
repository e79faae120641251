"""Options for other machines: left out with one line where they cannot be had, and taken back after training."""

from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from transformers.utils import import_utils

from skipwise.errors import UserError
from skipwise.models import load
from skipwise.models.attention import prefer_blocks
from skipwise.models.config import ModelConfig
from skipwise.models.forward import autocast
from skipwise.models.load import usable_attention, usable_dtype
from skipwise.training import kernels as speedups
from skipwise.training.config import TrainConfig
from skipwise.training.kernels import compiled_layers, usable_kernels
from tests.picomodels import VOCABULARY, pico_llama
from tests.picotypes import small_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def broken(*_: object, **__: object) -> object:
    raise RuntimeError("No working C++ compiler\nmore about it")


def test_what_a_cpu_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    model, lines = usable_attention(ModelConfig(path="x", attn_implementation="flash_attention_2"), CPU)
    train, more = usable_kernels(TrainConfig(use_liger_kernel=True, torch_compile=True), pico_llama(), CPU)
    assert (model.attn_implementation, train.use_liger_kernel, train.torch_compile) == (None, False, False)
    assert [line.split()[0].rstrip(":") for line in lines + more] == [
        "model.attn_implementation",
        "train.use_liger_kernel",
        "train.torch_compile",
    ]
    assert "No working C++ compiler" in more[1] and "\n" not in more[1]


@pytest.mark.parametrize(("kind", "runs"), [("llama", True), ("dbrx", False)])
def test_a_model_that_runs_in_one_dtype_only(kind: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the choice is ours, with a line; where it was the user's, refused with the remedy."""
    monkeypatch.setattr(load, "native_bfloat16", lambda: True)
    model = small_model(kind)
    dtype, lines = usable_dtype(ModelConfig(path="x"), model, CPU)
    assert (dtype, len(lines)) == ((torch.bfloat16, 0) if runs else (torch.float32, 1))
    assert usable_dtype(ModelConfig(path="x", dtype="float32"), model, CPU) == (torch.float32, [])
    asked = ModelConfig(path="x", dtype="bfloat16")
    if runs:
        assert usable_dtype(asked, model, CPU) == (torch.bfloat16, [])
    else:
        with pytest.raises(UserError) as refused:
            usable_dtype(asked, model, CPU)
        assert refused.value.code == "compute_dtype_not_supported"


@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_needs_the_packages(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_flash_attn_3_available", "is_liger_kernel_available"):
        monkeypatch.setattr(import_utils, name, lambda **_: there)
    model, lines = usable_attention(ModelConfig(path="x", attn_implementation="flash_attention_3"), GPU)
    train, more = usable_kernels(TrainConfig(use_liger_kernel=True), pico_llama(), GPU)
    assert model.attn_implementation == ("flash_attention_3" if there else None)
    assert train.use_liger_kernel == there
    assert len(lines + more) == (0 if there else 2)


def test_what_was_not_asked_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken)
    given = ModelConfig(path="x", attn_implementation="sdpa"), TrainConfig()
    assert usable_attention(given[0], CPU) == (given[0], [])
    assert usable_kernels(given[1], pico_llama(), CPU) == (given[1], [])


def test_what_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_llama()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    monkeypatch.setattr(speedups, "GradientCheckpointingLayer", torch.nn.Conv3d)
    train, lines = usable_kernels(TrainConfig(gradient_checkpointing=True, torch_compile=True), model, CPU)
    assert (train.gradient_checkpointing, train.torch_compile) == (False, False)
    assert len(lines) == 2


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


@pytest.mark.parametrize("batch", [1, 2])
def test_a_real_compiler_agrees(batch: int) -> None:
    """Where there is one; under autocast, with attention in blocks, where a wrong stride is an error."""
    if speedups._cannot_compile(pico_llama(), CPU):
        pytest.skip("no compiler")
    model = pico_llama(num_key_value_heads=2).train()
    prefer_blocks(model)
    ids = torch.randint(2, VOCABULARY, (batch, 8))
    gradients = []
    for context in (nullcontext(), compiled_layers(model)):
        model.zero_grad()
        with context, autocast(CPU, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()
