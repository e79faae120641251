"""Converted models compute what the originals do."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from skipwise import Lengths, UserError, YaRN, set_rope_scaling
from skipwise.cli import main as cli
from skipwise.export import convert
from skipwise.export.convert import convert_baichuan, convert_gptj, to_halves
from skipwise.models.probe import probe_attention
from skipwise.models.rope import read_rope
from tests.picomodels import BAICHUAN_SIZES, baichuan_weights

IDS = torch.randint(2, 258, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gptj(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=258, n_embd=64, n_layer=3, n_head=4, n_positions=64, rotary_dim=8, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    return tmp_path / "gptj"


def test_gptj_as_phi_has_the_same_logits(gptj: Path, tmp_path: Path) -> None:
    """Against the Hugging Face class."""
    convert_gptj(gptj, tmp_path / "phi")
    original = GPTJForCausalLM.from_pretrained(gptj).eval()
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "phi").eval()
    assert converted.config.model_type == "phi"
    torch.testing.assert_close(converted(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "phi")("x")["input_ids"]


def test_gptj_as_phi_can_be_extended(gptj: Path, tmp_path: Path) -> None:
    convert_gptj(gptj, tmp_path / "phi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "phi").eval()
    before = model(IDS).logits
    set_rope_scaling(model, YaRN(), Lengths(original=64, train=64, target=512))
    assert model.config.max_position_embeddings == 512 and read_rope(model.config).rope_type == "yarn"
    assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
    probe_attention(model, 512, 1)  # raises when positions have no effect


def test_rows_of_pairs_become_halves() -> None:
    rows = torch.arange(12.0)[:, None]  # two heads of 6, of which 4 are rotated
    assert to_halves(rows, 2, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_a_conversion_that_computes_something_else_is_not_written(
    gptj: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "to_halves", lambda weight, heads, rotated: weight)
    with pytest.raises(UserError, match="computes something else"):
        convert_gptj(gptj, tmp_path / "phi")
    assert [path.name for path in tmp_path.iterdir()] == ["gptj"]


def baichuan_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Its forward pass as its report says, token by token, in float64."""
    w = {name: weight.double() for name, weight in weights.items()}
    heads, size = (
        BAICHUAN_SIZES["num_attention_heads"],
        BAICHUAN_SIZES["hidden_size"] // BAICHUAN_SIZES["num_attention_heads"],
    )

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + BAICHUAN_SIZES["rms_norm_eps"])

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        out = x.clone()
        for j in range(size // 2):
            angle = position * 10000.0 ** (-2 * j / size)
            a, b = x[..., j], x[..., j + size // 2]
            out[..., j] = a * math.cos(angle) - b * math.sin(angle)
            out[..., j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(BAICHUAN_SIZES["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        packed = norm(x, w[f"{name}.input_layernorm.weight"]) @ w[f"{name}.self_attn.W_pack.weight"].T
        q, k, v = (part.view(len(ids), heads, size) for part in packed.split(BAICHUAN_SIZES["hidden_size"], dim=-1))
        q = torch.stack([turned(q[i], i) for i in range(len(ids))])
        k = torch.stack([turned(k[i], i) for i in range(len(ids))])
        rows = []
        for i in range(len(ids)):
            scores = torch.einsum("hd,jhd->hj", q[i], k[: i + 1]) / math.sqrt(size)
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[: i + 1]).reshape(-1))
        x = x + torch.stack(rows) @ w[f"{name}.self_attn.o_proj.weight"].T
        y = norm(x, w[f"{name}.post_attention_layernorm.weight"])
        gate = functional.silu(y @ w[f"{name}.mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[f"{name}.mlp.up_proj.weight"].T)) @ w[f"{name}.mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    head = head / head.norm(dim=-1, keepdim=True) if normalised else head
    return norm(x, w["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("normalised", [False, True])
def test_baichuan_as_llama_has_the_same_logits(normalised: bool, tmp_path: Path) -> None:
    """Against a forward pass written for this test; Baichuan 2 has the normalised head."""
    source = tmp_path / "baichuan"
    source.mkdir()
    config = {**BAICHUAN_SIZES, **({"z_loss_weight": 0} if normalised else {})}
    (source / "config.json").write_text(json.dumps(config))
    save_file(baichuan_weights(), source / "model.safetensors")
    convert_baichuan(source, tmp_path / "llama")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    expected = baichuan_logits(baichuan_weights(), IDS[0], normalised)
    torch.testing.assert_close(converted(IDS[:1]).logits[0].double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": None}, "ALiBi"),
        ({"num_hidden_layers": 4}, "not those of this family"),
        ({"hidden_size": 32}, "do not fit"),
        ({"model_type": "llama"}, "needs a baichuan model"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tmp_path / "baichuan"
    source.mkdir()
    config = {key: value for key, value in {**BAICHUAN_SIZES, **changes}.items() if value is not None}
    (source / "config.json").write_text(json.dumps(config))
    save_file(baichuan_weights(), source / "model.safetensors")
    with pytest.raises(UserError, match=message):
        convert_baichuan(source, tmp_path / "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["baichuan"]


def test_the_command(gptj: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> int:
        return cli.run(lambda: cli.app(["convert", *map(str, arguments)], standalone_mode=False))

    assert run("gptj", gptj, tmp_path / "phi") == 0
    assert run("gptj", gptj, tmp_path / "phi") == 2  # in the way
    assert run("gptx", gptj, tmp_path / "other") == 2
    assert run("baichuan", gptj, tmp_path / "other") == 2
