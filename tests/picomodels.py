"""Models and tokenizers of some ten thousand parameters, made on the fly. `picotypes` makes one of any type."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EuroBertConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JinaEmbeddingsV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from skipwise import Lengths
from skipwise.models.families import Family

VOCABULARY = 258  # every byte, and two special tokens
WINDOW = 64
NEAR = 24  # tokens that layers with sliding attention see

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def pico_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama of some ten thousand parameters, with weights large enough for its attention to matter."""
    torch.manual_seed(0)
    settings = {
        **_SIZES,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def pico_qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        **_SIZES, head_dim=16, num_key_value_heads=1, intermediate_size=48, max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def pico_neox() -> GPTNeoXForCausalLM:
    """Rotates a quarter of each head."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        **{**_SIZES, "hidden_size": 64}, intermediate_size=64, max_position_embeddings=WINDOW, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


PICO_MODELS = {"llama": pico_llama, "qwen3": pico_qwen3, "gpt_neox": pico_neox}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


LENGTHS = Lengths(original=WINDOW, train=WINDOW, target=512)

FAMILY_SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": WINDOW, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ALTERNATING = {"sliding_window": NEAR, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}

# What a family needs besides, and what makes it different from Llama.
FAMILY_SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": NEAR},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {"use_sliding_window": True, **ALTERNATING},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": NEAR},
    "gemma3_text": {"head_dim": 16, **ALTERNATING},
    "phi3": {"sliding_window": None},
    "falcon": {"alibi": False},
    "olmo3": ALTERNATING,
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "starcoder2": {"sliding_window": NEAR},
    "glm4": {"head_dim": 16},
    "cohere": {"logit_scale": 0.25},
    "modernbert-decoder": {"local_attention": 2 * NEAR},
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
}  # fmt: skip

ENCODER_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 258,
    "max_position_embeddings": WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

ENCODERS: dict[str, PreTrainedConfig] = {
    "modernbert": ModernBertConfig(
        **ENCODER_SIZES, local_attention=12, cls_token_id=1, sep_token_id=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "eurobert": EuroBertConfig(**ENCODER_SIZES, mask_token_id=3),
    "nomic_bert": NomicBertConfig(**ENCODER_SIZES),
    "jina_embeddings_v3": JinaEmbeddingsV3Config(**ENCODER_SIZES),
}  # fmt: skip


def pico_encoder(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """An encoder that fills in masks."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(deepcopy(ENCODERS[kind]), attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():  # or attention is nearly uniform, and hides little
            weight.mul_(3.0)
    return model


def picomodel(family: Family) -> PreTrainedModel:
    """A model of this family, with weights large enough for its attention to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **{**FAMILY_SIZES, **FAMILY_SPECIAL.get(family.model_type, {})})
    return AutoModelForCausalLM.from_config(config).eval()


def encoder_tokenizer(mask: str | None = "<mask>") -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<mask>", *map(str, range(4, 100))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", mask_token=mask)


def t5gemma(window: int = 16) -> PreTrainedModel:
    half = {**ENCODER_SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": window, "dropout_rate": 0.0}
    parts = {"encoder": T5GemmaModuleConfig(**half), "decoder": T5GemmaModuleConfig(**half)}
    torch.manual_seed(0)
    return T5GemmaForConditionalGeneration(T5GemmaConfig(**parts, vocab_size=ENCODER_SIZES["vocab_size"])).eval()


BAICHUAN_SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False, "model_type": "baichuan",
}  # fmt: skip


def baichuan_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    hidden, inner = BAICHUAN_SIZES["hidden_size"], BAICHUAN_SIZES["intermediate_size"]
    weights = {"model.embed_tokens.weight": random(258, hidden), "model.norm.weight": 1 + random(hidden)}
    weights["lm_head.weight"] = random(258, hidden)
    for layer in range(BAICHUAN_SIZES["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.W_pack.weight": random(3 * hidden, hidden),
            f"{name}.self_attn.o_proj.weight": random(hidden, hidden),
            f"{name}.self_attn.rotary_emb.inv_freq": torch.ones(8),
            f"{name}.mlp.gate_proj.weight": random(inner, hidden),
            f"{name}.mlp.up_proj.weight": random(inner, hidden),
            f"{name}.mlp.down_proj.weight": random(hidden, inner),
            f"{name}.input_layernorm.weight": 1 + random(hidden),
            f"{name}.post_attention_layernorm.weight": 1 + random(hidden),
        }
    return weights


SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 300, "max_position_embeddings": 4096,
}  # fmt: skip


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path
