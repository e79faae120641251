"""Shapes of published configs: what every command says of them, and why some are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipwise import UserError
from skipwise.export.hf_config import completed_config
from skipwise.export.inspection import inspect_model
from skipwise.models.config import ModelConfig
from skipwise.models.skeleton import build_skeleton, layers_with_rope
from tests.commands import error_code, skipwise
from tests.picomodels import SMALL_LLAMA, WINDOW, write_config
from tests.picotypes import small_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"

# Sizes of published models, and their parameters in millions: all, and those that a token meets.
COUNTED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Llama 2 7B": (LLAMA, 6738.4, 6738.4),
    "Falcon 7B, one key head, no window": (
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
         "vocab_size": 65024, "multi_query": True, "alibi": False, "new_decoder_architecture": False}, 6921.7, 6921.7,
    ),
    "Gemma 2 9B, tied": (
        {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 42, "vocab_size": 256000,
         "max_position_embeddings": 8192}, 9241.7, 9241.7,
    ),
    "Mixtral 8x7B": (
        {**LLAMA, "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8,
         "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768}, 46702.8, 12879.9,
    ),
    "Qwen3 30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "num_hidden_layers": 48, "vocab_size": 151936, "tie_word_embeddings": False,
         "max_position_embeddings": 40960}, 30532.1, 3353.0,
    ),
    "SmolLM2 135M": (
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
         "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
         "max_position_embeddings": 8192}, 134.5, 134.5,
    ),
}  # fmt: skip

# What is refused: keys, and the code of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Baichuan": ({**LLAMA, "model_type": "baichuan"}, "family_not_supported"),
    "remote code": ({**LLAMA, "model_type": "internlm2", "auto_map": {"AutoConfig": "a.B"}}, "remote_code_needed"),
    "a type that is not there yet": ({**LLAMA, "model_type": "llama99"}, "unknown_model_type"),
    "Qwen2.5-VL, text at the top": (
        {**SMALL_LLAMA, "model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "not_a_causal_model",
    ),
    "ModernBERT": ({**SMALL_LLAMA, "model_type": "modernbert", "pad_token_id": 0}, "not_a_causal_model"),
    "T5Gemma": ({"model_type": "t5gemma"}, "not_a_causal_model"),
    "a model of images": ({"model_type": "vit"}, "not_a_causal_model"),
    "several language models": ({"model_type": "musicgen"}, "several_language_models"),
    "EXAONE 4": (
        {**SMALL_LLAMA, "model_type": "exaone4", "sliding_window": 512, "layer_types": [SLIDING] * 3 + [FULL]},
        "no_rope_in_full_attention",
    ),
    "Command R7B": ({**SMALL_LLAMA, "model_type": "cohere2", "sliding_window": 512}, "no_rope_in_full_attention"),
    "Hunyuan, alpha": (
        {**SMALL_LLAMA, "model_type": "hunyuan_v1_dense", "head_dim": 16,
         "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}, "frequencies_not_understood",
    ),
    "Gemma 4": ({**SMALL_LLAMA, "model_type": "gemma4_text"}, "unknown_rope_type"),
    "Qwen3-Next": ({**SMALL_LLAMA, "model_type": "qwen3_next"}, "layer_type_not_supported"),
    "Granite 4 hybrid, no positions": ({**SMALL_LLAMA, "model_type": "granitemoehybrid"}, "no_rope"),
    "Jamba": ({**SMALL_LLAMA, "model_type": "jamba"}, "no_rope"),
    "DeepSeek V2, attention scaled": (
        {**SMALL_LLAMA, "model_type": "deepseek_v2", "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7,
         "mscale_all_dim": 0.7, "original_max_position_embeddings": 1024}}, "attention_scaled_before",
    ),
    "YaRN without an original window": (
        {**SMALL_LLAMA, "model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "window_ambiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_of_the_published_model(name: str, tmp_path: Path) -> None:
    config, total, active = COUNTED[name]
    found = inspect_model(ModelConfig(path=str(write_config(tmp_path / "model", config)))).parameters
    assert found.total / 1e6 == pytest.approx(total, rel=0.01)
    assert found.active / 1e6 == pytest.approx(active, rel=0.01)


def test_plan_says_what_the_model_is_whatever_its_kind(tmp_path: Path) -> None:
    """Costs are known for dense models alone; windows and parameters of all."""
    for name in ("Falcon 7B, one key head, no window", "Mixtral 8x7B"):
        config, total, active = COUNTED[name]
        model = write_config(tmp_path / name, config)
        plan = json.loads(skipwise("plan", model, "--target", "256k", "--json"))
        assert plan["total"] / 1e6 == pytest.approx(total, rel=0.01)
        assert plan["active"] / 1e6 == pytest.approx(active, rel=0.01)
        assert bool(plan["costs"]) == (total == active)
        printed = " ".join(skipwise("plan", model, "--target", "256k").split())  # a long path breaks lines
        assert f"{plan['total'] / 1e6:,.1f} M parameters" in printed


def test_layers_for_multi_token_prediction_are_counted_apart(tmp_path: Path) -> None:
    """GLM-4.5: 358,337.8 M parameters are published, of which transformers loads 352,797.8."""
    glm = {
        "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 160,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "num_hidden_layers": 92,
        "vocab_size": 151552, "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    found = inspect_model(ModelConfig(path=str(write_config(tmp_path / "model", glm)))).parameters
    assert found.total / 1e6 == pytest.approx(352797.8, rel=1e-4)
    assert (found.total + found.not_loaded) / 1e6 == pytest.approx(358337.8, rel=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_every_command_refuses_for_the_same_reason(name: str, tmp_path: Path) -> None:
    config, code = REFUSED[name]
    model = write_config(tmp_path / "model", config)
    for arguments in (
        ["plan", model, "--target", "1m"],
        ["extend", model, "--target", "1m", "--data", "builtin:python", "--output", tmp_path / "run", "--dry-run"],
    ):
        assert error_code(skipwise(*arguments, code=2)) == code
    said = skipwise("doctor", model, "--target", "1m", code=2)
    # What can be read in two ways is a finding of doctor's.
    assert error_code(said) == ("model_has_faults" if code == "window_ambiguous" else code)
    assert not (tmp_path / "run").exists()


def test_a_refused_wrapper_names_its_language_model(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", REFUSED["Qwen2.5-VL, text at the top"][0])
    with pytest.raises(UserError, match="qwen2_5_vl_text"):
        inspect_model(ModelConfig(path=str(model)))


def test_both_readings_of_a_window_can_be_taken(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", REFUSED["YaRN without an original window"][0])
    for original, current in ((4096, 16384), (1024, 4096)):
        plan = json.loads(skipwise("plan", model, "--target", "64k", "--original", original, "--json"))
        assert (plan["original_length"], plan["current_length"]) == (original, current)


def test_llama_32_is_read_alike_by_all(tmp_path: Path) -> None:
    """doctor said 131,072 and proposed a target that plan and extend refused: they read 262,144."""
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    keys = {**SMALL_LLAMA, "model_type": "llama", "max_position_embeddings": 131072, "rope_scaling": rope}
    model = write_config(tmp_path / "model", keys)
    doctor = json.loads(skipwise("doctor", model, "--target", "256k", "--json"))
    plan = json.loads(skipwise("plan", model, "--target", "256k", "--json"))
    assert (doctor["original"], doctor["current"]) == (8192, 131072)
    assert (plan["original_length"], plan["current_length"]) == (8192, 131072)
    arguments = ["--target", "256k", "--data", "builtin:python", "--dry-run"]
    assert "131,072" in skipwise("extend", model, *arguments)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "smollm3", "gpt_oss", "ministral3", "phi3"])
def test_models_with_rope_in_full_attention_are_taken(kind: str, tmp_path: Path) -> None:
    """Also where some layers have no positions, or a family's attention takes arguments of its own."""
    config = {**SMALL_LLAMA, "model_type": kind, "head_dim": 16, "num_hidden_layers": 8, "pad_token_id": 0}
    config |= {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}} if kind == "ministral3" else {}
    config |= {"layer_types": [SLIDING, FULL] * 4} if kind == "gpt_oss" else {}
    info = inspect_model(ModelConfig(path=str(write_config(tmp_path / "model", config))))
    assert info.windows.current >= 4096


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3"])
def test_how_far_layers_see_is_said_before_a_run(kind: str, tmp_path: Path) -> None:
    """Mistral 7B v0.1 and Phi-3-mini-4k see their last tokens only; a window beyond the model's is none."""
    config = {**SMALL_LLAMA, "model_type": kind, "pad_token_id": 0, "sliding_window": 1024}
    model = write_config(tmp_path / "near", config)
    everywhere = write_config(tmp_path / "far", {**config, "sliding_window": 2**21})
    for command in (["plan"], ["extend", "--dry-run", "--data", "builtin:python"]):
        said = skipwise(command[0], model, "--target", "16k", *command[1:])
        assert ("1,024 tokens" in said) == (kind != "llama")
        assert "see only" not in skipwise(command[0], everywhere, "--target", "16k", *command[1:])
    layers = json.loads(skipwise("doctor", model, "--json"))["layers"]
    assert any("1,024" in line for line in layers) == (kind != "llama")
    assert json.loads(skipwise("doctor", everywhere, "--json"))["layers"] == ["all 4 see all of the text"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("blt", "several_language_models"),
        ("moshi", "several_language_models"),
        ("musicgen", "several_language_models"),
        ("beam", "no_rope_in_full_attention"),
        ("roformer", "family_not_supported"),
        ("granite_swa", "rope_of_layers_apart"),
    ],
)
def test_others_are_refused_from_their_config_alone(kind: str, code: str, tmp_path: Path) -> None:
    small_config(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as refused:
        inspect_model(ModelConfig(path=str(tmp_path / "model")))
    assert refused.value.code == code


def test_a_layer_with_a_table_of_its_own_is_not_asked() -> None:
    """It takes positions, and no cosines and sines."""
    assert layers_with_rope(build_skeleton(small_config("moshi"))) == {}
    assert layers_with_rope(build_skeleton(small_config("llama"))) == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("kind", ["dbrx", "longcat_flash", "persimmon"])
def test_a_config_with_names_of_its_own_is_read(kind: str, tmp_path: Path) -> None:
    """DBRX calls its window max_seq_len. Seen to be refused as one without RoPE."""
    small_config(kind).save_pretrained(tmp_path / "model")
    info = inspect_model(ModelConfig(path=str(tmp_path / "model")))
    assert (info.windows.original, info.windows.current) == (WINDOW, WINDOW)
    assert completed_config(info.config.to_dict())["max_position_embeddings"] == WINDOW
