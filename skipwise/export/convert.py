"""Two families in the layout of Hugging Face ones that can carry a scaled RoPE: GPT-J as Phi, Baichuan as Llama.

What a converted model computes is what the original does; only names, the order of rows and a few zeros are new.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from skipwise.errors import UserError
from skipwise.export.legacy import with_legacy_rope
from skipwise.models.quantized import check_quantization
from skipwise.models.shape import read_config
from skipwise.models.weight_files import check_files
from skipwise.utils.files import new_directory, share_weights, write_json

Weights = dict[str, torch.Tensor]
# Difference of logits that rounding may make, as a share of the largest.
SAME = 1e-3


def convert_gptj(source: Path, output: Path) -> None:
    """Write a GPT-J model as a Phi model: a parallel block, a part of each head rotated, a bias in the output layer.

    GPT-J rotates neighbouring dimensions together and Phi the two halves of the rotated part, so rows of queries and
    keys change places. Biases that GPT-J does not have are zero.

    Args:
        source: directory with `config.json` and safetensors.
        output: new directory.

    Raises:
        UserError: when the model cannot be read, or the converted one computes something else.
    """
    config = _config_of(source, "gptj")
    with new_directory(output) as directory:
        weights = _safetensors(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The tokenizer in {source} cannot be read: {str(error).splitlines()[0]}", code="unreadable_tokenizer"
            ) from error
        tables = ("attn.bias", "attn.masked_bias", "embed_positions")  # that older files hold, computed from the config
        own = {name: weight for name, weight in weights.items() if not name.endswith(tables)}
        original = _filled(GPTJForCausalLM, GPTJConfig(**config), own)
        converted = _filled(PhiForCausalLM, phi_config(GPTJConfig(**config)), phi_weights(original))
        _check_same(original, converted)
        _write(converted, directory)
        tokenizer.save_pretrained(directory)


def phi_config(config: GPTJConfig) -> PhiConfig:
    """The config of a GPT-J model, for Phi."""
    head_dim = config.n_embd // config.n_head
    return PhiConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        hidden_act=config.activation_function,
        max_position_embeddings=config.n_positions,
        layer_norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": (config.rotary_dim or head_dim) / head_dim,
        },
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


# Of a layer of GPT-J and of Phi: modules whose parameters only change their names.
_PHI_NAMES = {
    "ln_1": "input_layernorm",
    "attn.out_proj": "self_attn.dense",
    "mlp.fc_in": "mlp.fc1",
    "mlp.fc_out": "mlp.fc2",
}


def phi_weights(model: PreTrainedModel) -> Weights:
    """The weights of a GPT-J model, by the names of Phi."""
    config, old = model.config, model.state_dict()
    heads, rotated = config.n_head, config.rotary_dim or config.n_embd // config.n_head
    new = {
        "model.embed_tokens.weight": old["transformer.wte.weight"],
        "model.final_layernorm.weight": old["transformer.ln_f.weight"],
        "model.final_layernorm.bias": old["transformer.ln_f.bias"],
        "lm_head.weight": old["lm_head.weight"],
        "lm_head.bias": old["lm_head.bias"],
    }
    nothing = torch.zeros(config.n_embd, dtype=new["lm_head.weight"].dtype)
    for layer in range(config.n_layer):
        before, after = f"transformer.h.{layer}", f"model.layers.{layer}"
        for name, other in _PHI_NAMES.items():
            weight = old[f"{before}.{name}.weight"]
            new[f"{after}.{other}.weight"] = weight
            bias = old.get(f"{before}.{name}.bias")
            new[f"{after}.{other}.bias"] = nothing.clone() if bias is None else bias
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = old[f"{before}.attn.{name}.weight"]
            new[f"{after}.self_attn.{name}.weight"] = weight if name == "v_proj" else to_halves(weight, heads, rotated)
            new[f"{after}.self_attn.{name}.bias"] = nothing.clone()
    return new


def to_halves(weight: torch.Tensor, heads: int, rotated: int) -> torch.Tensor:
    """Rows of queries or keys, from pairs of neighbours to two halves.

    Args:
        weight: float[heads * d, n]; in each head the first `rotated` rows are rotated, 2i together with 2i + 1.

    Returns:
        The same rows, i together with i + rotated / 2.
    """
    by_head = weight.view(heads, -1, weight.shape[-1])
    pairs = by_head[:, :rotated]
    return torch.cat([pairs[:, 0::2], pairs[:, 1::2], by_head[:, rotated:]], dim=1).reshape(weight.shape)


def convert_baichuan(source: Path, output: Path) -> None:
    """Write a Baichuan or Baichuan 2 model of 7B as a Llama: the packed matrix split in three, and the output layer of
    Baichuan 2, which divides each of its rows by their length when it is used, written so.

    Nothing of the model's own code is run. Its tokenizer is one of sentencepiece and becomes that of Llama.

    Args:
        source: directory with `config.json` and safetensors.
        output: new directory.

    Raises:
        UserError: when the model cannot be read, is one of 13B (which has ALiBi), or has unknown weights.
    """
    config = _config_of(source, "baichuan")
    if "max_position_embeddings" not in config:
        raise UserError(
            f"{source} has ALiBi, as Baichuan of 13B does: there is no RoPE to scale. Choose one of 7B.", code="no_rope"
        )
    with new_directory(output) as directory:
        weights = llama_weights(_safetensors(source), normalised="z_loss_weight" in config)
        _write(_filled(LlamaForCausalLM, llama_config(config), weights), directory)
        if (source / "tokenizer.model").is_file():
            shutil.copy(source / "tokenizer.model", directory)
            given = _json(source / "tokenizer_config.json")
            kept = {key: value for key, value in given.items() if key not in ("auto_map", "tokenizer_class")}
            write_json(directory / "tokenizer_config.json", {**kept, "tokenizer_class": "LlamaTokenizer"})


def llama_config(config: dict[str, Any]) -> LlamaConfig:
    """The config of a Baichuan model, for Llama."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    given = {name: config[name] for name in names if name in config}
    return LlamaConfig(**given, tie_word_embeddings=bool(config.get("tie_word_embeddings")), rope_parameters=rope)


def llama_weights(old: Weights, normalised: bool) -> Weights:
    """The weights of a Baichuan model, by the names of Llama.

    Args:
        normalised: whether its output layer divides its rows by their length.
    """
    new: Weights = {}
    for name, weight in old.items():
        if name.endswith("self_attn.W_pack.weight"):
            for part, own in zip("qkv", weight.chunk(3), strict=True):
                new[name.replace("W_pack", f"{part}_proj")] = own.contiguous()
        elif name == "lm_head.weight" and normalised:
            new[name] = nn.functional.normalize(weight.float()).to(weight.dtype)
        elif not name.endswith("rotary_emb.inv_freq"):  # computed from the config
            new[name] = weight
    return new


CONVERSIONS = {"gptj": convert_gptj, "baichuan": convert_baichuan}


def _config_of(source: Path, kind: str) -> dict[str, Any]:
    if not source.is_dir():
        raise UserError(
            f"convert reads a directory, and {source} is none. Download the model and name that.",
            code="not_a_directory",
        )
    config = read_config(str(source))
    check_quantization(config, str(source))
    if config.get("model_type") != kind:
        raise UserError(
            f"convert {kind} needs a {kind} model, but {source} is a {config.get('model_type')!r}.",
            code="wrong_model_type",
        )
    return config


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    assert isinstance(content, dict)
    return content


def _safetensors(source: Path) -> Weights:
    return {name: weight for file in check_files(source) for name, weight in load_file(file).items()}


def _filled(kind: type[PreTrainedModel], config: Any, weights: Weights) -> PreTrainedModel:
    """A model with these very weights, none of them copied."""
    with torch.device("meta"):
        model = kind(config)
    try:
        left = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # of shapes
        raise UserError(f"The weights do not fit the config: {error}", code="weights_do_not_fit") from error
    missing = [name for name in left.missing_keys if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or left.unexpected_keys:
        raise UserError(
            f"The weights are not those of this family: {', '.join([*missing, *left.unexpected_keys][:4])} do not fit.",
            code="weights_do_not_fit",
        )
    return model


@torch.no_grad()
def _check_same(original: PreTrainedModel, converted: PreTrainedModel) -> None:
    """Raise `UserError` unless both models compute the same of a few tokens."""
    models = []
    for model in (original, converted):  # with tables, which a model that was made without weights has not
        again = type(model)(model.config)
        again.load_state_dict(model.state_dict(), assign=True)
        models.append(again.eval())
    ids = torch.arange(1, 25)[None] % original.config.vocab_size
    before, after = (model(ids).logits.float() for model in models)
    tolerance = SAME if original.dtype == torch.float32 else 0.05
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        raise UserError(
            "The converted model computes something else than the original, so nothing is written.",
            code="conversion_differs",
        )


def _write(model: PreTrainedModel, directory: Path) -> None:
    model.config.dtype = next(model.parameters()).dtype
    model.save_pretrained(directory)
    write_json(directory / "config.json", with_legacy_rope(_json(directory / "config.json")))
    share_weights(directory)
