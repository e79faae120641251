"""A small model of any type that transformers has a causal class for, from the default config of its own class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.picomodels import NEAR, VOCABULARY, WINDOW

CAUSAL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LAYERS, HEADS = 4, 4

# Every byte, two special tokens of the tests' tokenizer, and room for those that a type has besides.
MORE_TOKENS = 320

# Of the largest model: 4 MB in float32.
MOST_PARAMETERS = 1_000_000


def _named(value: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, value)


# Sizes by the names that configs have for them; what is smaller by default stays.
TYPE_SIZES = {
    **_named(MORE_TOKENS, "vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"),
    **_named(
        64, "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "input_embedding_size", "embedding_dim",
        "output_embedding_size", "word_embed_proj_dim", "lru_width", "hidden_size_global",
        "out_hidden_size", "backbone_hidden_size", "adapter_in_dim", "adapter_out_dim", "input_size",
        "projector_input_dim", "projector_output_dim", "vision_output_dim", "output_channels",
    ),
    **_named(
        96, "intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "d_inner",
        "dim_ff", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size", "mlp_dim",
    ),
    **_named(
        32, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
        "attention_chunk_size", "chunk_size", "mamba_chunk_size", "q_lora_rank", "o_lora_rank", "router_hidden_size",
        "hidden_size_per_layer_input", "prompt_mid_dim", "num_centroids",
    ),
    **_named(
        LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack", "conf_num_hidden_layers",
        "num_global_layers",
    ),
    **_named(
        HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "mamba_n_heads",
        "linear_num_heads", "linear_num_value_heads", "swa_num_attention_heads", "mamba_num_heads", "num_query_groups",
        "conf_num_attention_heads",
    ),
    **_named(
        2, "num_key_value_heads", "num_kv_heads", "kv_n_heads", "linear_num_key_heads", "swa_num_key_value_heads",
        "index_n_heads", "n_mamba_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k",
        "moe_k", "n_groups", "n_group", "num_expert_group", "o_groups", "hc_mult", "hc_count", "altup_num_inputs",
        "num_codebooks", "num_random_blocks", "heads_per_ngram", "split_ngram_parts",
    ),
    **_named(1, "topk_group", "num_kv_shared_layers", "first_k_dense_replace", "num_dense_layers"),
    **_named(
        4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num", "hc_lowrank",
        "index_topk_blocks", "num_mem_blocks", "laurel_rank", "adapter_rank", "gated_norm_rank", "mamba_dt_rank",
        "time_step_rank", "prompt_length", "max_num_tiles", "centroid_intermediate_top_k",
    ),
    **_named(
        16, "head_dim", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank", "index_head_dim", "linear_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "kv_channels", "d_kv", "d_head", "dim_head",
        "attention_head_size", "mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size",
        "rotary_dim", "index_topk", "index_block_size", "block_size", "ple_embed_dim", "d_rel", "query_pre_attn_scalar",
    ),
    **_named(8, "qk_rope_head_dim", "keep_window_size", "sequence_length"),
    **_named(
        WINDOW, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length",
        "max_target_positions", "max_source_positions", "rel_extent", "original_max_position_embeddings",
        "floor_scale", "log_scaling_n_floor", "num_position_embeddings",
    ),
    **_named(
        NEAR, "sliding_window", "sliding_window_size", "window_size", "attention_window_size",
        "local_attention_window_len",
    ),
    **_named(2 * NEAR, "local_attention"),
}  # fmt: skip

# Lists with an element for each layer; one layer of each kind is kept.
PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "no_rope_layers",
    "activation_sparsity_pattern", "intermediate_size", "num_attention_heads_per_layer", "layer_rope_theta",
)  # fmt: skip

# What a type needs besides: sizes that depend on each other, and what its default config leaves out.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}  # twice the hidden size

_HYBRID = ["linear_attention", "hybrid"] * 2

_DOTS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip

_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
    "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
}  # fmt: skip

TYPE_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 64},  # of which an eighth is rotated
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS, "audio_config": {"adapter_input_size": 64}},
    "dots3_note_text": _DOTS,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 24},  # of which a third is rotated
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 32, "num_blocks": 1,
        },
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "image_size": 56, "crop_size": 56},
    },
    "qwen4_exp": {"text_config": _QWEN4 | {"head_dim": 16}},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 64, "pronunciation_embed_dim": 16, "shape_vocab_size": 64, "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID},
}  # fmt: skip

# What a default config lacks to be one at all.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}

# What transformers does not build from a config: its auto class takes that of a part (musicgen), the layers of an
# assistant share what none of them has (gemma4), or a package is missing (timm). They have a config, and no weights.
CONFIG_ONLY = ("gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody")


def small_config(kind: str) -> PreTrainedConfig:
    """The default config of a type with small sizes, those of nested configs, too."""
    return _small(CONFIG_MAPPING[kind](**NEEDED.get(kind, {})), TYPE_SPECIAL.get(kind, {}))


def _small(default: PreTrainedConfig, special: dict[str, Any]) -> PreTrainedConfig:
    """The same config with small sizes.

    Args:
        special: values of its own, in a dictionary for each nested config.
    """
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    nested = {
        name: _small(value, special.get(name, {})).to_dict()
        for name, value in values.items()
        if isinstance(value, PreTrainedConfig)
    }
    settings: dict[str, Any] = {
        name: min(value, TYPE_SIZES[name]) for name, value in values.items() if _is_size(name, value)
    }
    settings |= {
        name: 0.2 for name in ("initializer_range", "init_std") if name in values
    }  # or attention hardly matters
    if isinstance(values.get("rope_parameters"), dict):
        settings["rope_parameters"] = _rope(values["rope_parameters"])
    if "num_attention_heads" in settings and values.get("num_key_value_heads") == values["num_attention_heads"]:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "qk_rope_head_dim" in values:  # of which the class makes the size of a head
        settings.pop("head_dim", None)
    return type(default)(**{**settings, **_layers(values), **_tokens(values), **special, **nested})


def _is_size(name: str, value: Any) -> bool:
    return name in TYPE_SIZES and isinstance(value, int) and not isinstance(value, bool)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters, of an earlier extension counted from a small window."""
    inner = {name: _rope(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    return inner | {name: WINDOW for name in inner if name == "original_max_position_embeddings"}


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """The lists of a config that say something of each layer, for one layer of each kind and a few more."""
    lists = {name: values[name] for name in PER_LAYER if isinstance(values.get(name), list | tuple) and values[name]}
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds})
    rest = [number for number in range(len(kinds)) if number not in chosen]
    chosen = sorted([*chosen, *rest[: max(0, LAYERS - len(chosen))]])
    found: dict[str, Any] = {
        name: [min(value[number], TYPE_SIZES[name]) if name in TYPE_SIZES else value[number] for number in chosen]
        for name, value in lists.items()
    }
    return found | ({"num_hidden_layers": len(chosen)} if "num_hidden_layers" in values else {})


def _tokens(values: dict[str, Any]) -> dict[str, Any]:
    """Ids of special tokens: begin and end as in the tests' tokenizer, and what is too large outside of text."""
    names = [name for name, value in values.items() if name.endswith(("token_id", "token_index")) and value is not None]
    large = [name for name in names if isinstance(values[name], int) and values[name] >= VOCABULARY]
    ids = {name: VOCABULARY + number for number, name in enumerate(large)}
    return ids | {name: int(name == "eos_token_id") for name in names if name in ("bos_token_id", "eos_token_id")}


def parameters_of(config: PreTrainedConfig) -> int:
    """Weights of a model, without making them."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def small_model(kind: str) -> PreTrainedModel:
    """A model of this type with random weights; bounded in size before they are made."""
    config = small_config(kind)
    count = parameters_of(config)
    assert count <= MOST_PARAMETERS, f"{kind} has {count:,} parameters: add its sizes to SIZES or SPECIAL"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
