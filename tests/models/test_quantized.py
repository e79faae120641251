"""Small checkpoints as they are published: MXFP4 (gpt-oss) and FP8 in its forms. The right values are made here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from skipwise.models.config import ModelConfig
from skipwise.models.load import check_weights, load_model
from tests.commands import skipwise
from tests.picomodels import VOCABULARY, byte_tokenizer, pico_llama

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
# What four bits can be, by their number (OCP Microscaling Formats 1.0, table 5).
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_LARGEST = 448


def in_mxfp4(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of 32 numbers, two of them in a byte; a power of two for each block; and what these are.

    Args:
        experts: float32[experts, in, out].

    Returns:
        uint8[experts, out, in / 32, 16], uint8[experts, out, in / 32], float32[experts, in, out].
    """
    blocks = experts.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / FP4.max()).log2().ceil()
    scaled = blocks / exponents.exp2()[..., None]
    numbers = (scaled[..., None] - FP4).abs().argmin(-1)
    values = (FP4[numbers] * exponents.exp2()[..., None]).flatten(-2).transpose(1, 2)
    pairs = numbers.unflatten(-1, (16, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8), (exponents + 127).to(torch.uint8), values


def save(directory: Path, model: PreTrainedModel, weights: Weights, settings: dict[str, Any]) -> None:
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def test_mxfp4_is_dequantised_trained_and_written_as_ordinary_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, initializer_range=0.2,
    )  # fmt: skip
    original, stored, wanted = GptOssForCausalLM(config), Weights(), Weights()
    for name, weight in original.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], wanted[name] = in_mxfp4(weight)
        else:
            stored[name] = weight
    base, run, text = tmp_path / "base", tmp_path / "run", tmp_path / "text.txt"
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    save(base, original, stored, settings)
    check_weights(ModelConfig(path=str(base)))
    loaded = load_model(ModelConfig(path=str(base)), CPU).state_dict()
    assert len(wanted) == 4 and all(torch.equal(loaded[name], own) for name, own in wanted.items())
    text.write_text("words and more words " * 1000)
    keys = ["train.max_steps=1", "train.per_device_train_batch_size=1", "evaluate=[]"]
    more = [part for key in keys for part in ("--set", key)]
    said = skipwise("extend", base, "--target", "512", "--data", text, "--output", run, *more)
    assert "read back" in said
    assert "quantization_config" not in json.loads((run / "model" / "config.json").read_text())
    assert {weight.dtype for weight in load_file(run / "model" / "model.safetensors").values()} == {torch.float32}


def per_tensor(weight: torch.Tensor) -> Weights:
    """One scale, and one for activations (Ministral 3)."""
    scale = (weight.abs().max() / FP8_LARGEST).to(torch.bfloat16)
    return {
        "weight": (weight / scale).to(torch.float8_e4m3fn),
        "weight_scale_inv": scale,
        "activation_scale": torch.tensor(0.5),
    }


def in_blocks(weight: torch.Tensor, powers: bool = False, size: int = 64) -> Weights:
    """A scale for every block (DeepSeek-V3), or a power of two for each (DeepSeek-V3.1)."""
    blocks = weight.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    scale = blocks.abs().amax((1, 3)) / FP8_LARGEST
    scale = scale.log2().ceil().exp2() if powers else scale
    quantized = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return {"weight": quantized, "weight_scale_inv": scale.to(torch.float8_e8m0fnu) if powers else scale}


FORMS: dict[str, tuple[Callable[[torch.Tensor], Weights], dict[str, Any]]] = {
    "one scale": (per_tensor, {"activation_scheme": "static", "weight_block_size": None}),
    "blocks": (in_blocks, {"activation_scheme": "dynamic", "weight_block_size": [64, 64]}),
    "powers of two": (
        lambda weight: in_blocks(weight, powers=True),
        {"activation_scheme": "dynamic", "weight_block_size": [64, 64], "scale_fmt": "ue8m0"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_fp8_gives_its_values(form: str, tmp_path: Path) -> None:
    quantize, settings = FORMS[form]
    original = pico_llama(hidden_size=128, intermediate_size=128, tie_word_embeddings=False)
    stored: Weights = {}
    for name, weight in original.state_dict().items():
        if "_proj" in name:
            stored.update({f"{name.removesuffix('weight')}{part}": own for part, own in quantize(weight).items()})
        else:
            stored[name] = weight
    save(tmp_path, original, stored, {"quant_method": "fp8", **settings})
    check_weights(ModelConfig(path=str(tmp_path)))
    loaded = load_model(ModelConfig(path=str(tmp_path)), CPU).state_dict()
    assert loaded.keys() == original.state_dict().keys()
    for name, weight in original.state_dict().items():
        # Three bits behind the leading one: a sixteenth of a number; of the smallest ones of a block a little more.
        torch.testing.assert_close(loaded[name], weight, rtol=1 / 16, atol=float(weight.abs().max()) / FP8_LARGEST / 64)
