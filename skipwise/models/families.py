"""What is particular about a family of models, one row each; and the kinds of positions that cannot be extended.

Everything else is read from the config, so a model type without a row is not refused: it is not among those tested. No
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
        model_type: as in `config.json`.
        models: known by these names.
        gated: whether feed-forward layers have three matrices, or two.
        tied: whether input and output embedding are one matrix, unless the config says otherwise.
        pretrained: window of pretraining, in tokens, where configs of extended models have lost it.
        vllm: `own` code for it, with longrope; `pairs`: own code without (it rotates neighbours); `transformers`' code;
            or `none`.
        llama_cpp: whether its converter writes the RoPE as `usual`, `nothing` of it, the `theta` only, every factor as
            `linear`, or there is `none` (llama-cpp-python 0.3.36).
        legacy_names: what configs before transformers 5 call `rope_theta`, `partial_rotary_factor`, `rope_scaling` and
            the theta of windowed layers, `sliding_theta`; None for what they cannot say.
    """

    model_type: str
    models: str
    gated: bool = True
    tied: bool = False
    pretrained: int | None = None
    vllm: Literal["own", "pairs", "transformers", "none"] = "own"
    llama_cpp: Literal["usual", "nothing", "theta", "linear", "none"] = "usual"
    legacy_names: Mapping[str, str | None] = field(default_factory=dict)


_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_GEMMA3_NAMES = {"sliding_theta": "rope_local_base_freq"}
_MODERNBERT_NAMES = {"rope_theta": "global_rope_theta", "sliding_theta": "local_rope_theta", "rope_scaling": None}

FAMILIES = (
    Family("llama", "Llama 1, 2 and 3, SmolLM2, Yi, TinyLlama"),
    Family("mistral", "Mistral"),
    Family("mixtral", "Mixtral"),
    Family("qwen2", "Qwen2, Qwen2.5"),
    Family("qwen2_moe", "Qwen1.5 and Qwen2 with experts"),
    Family("qwen3", "Qwen3"),
    Family("qwen3_moe", "Qwen3 with experts"),
    Family("gemma", "Gemma 1", tied=True, llama_cpp="nothing"),
    Family("gemma2", "Gemma 2", tied=True, llama_cpp="nothing"),
    # Pretrained with 32k, then extended to 128k with a factor of 8 (arXiv 2503.19786, Section 2).
    Family("gemma3_text", "Gemma 3, its language model", tied=True, pretrained=32768, legacy_names=_GEMMA3_NAMES),
    Family("phi", "Phi-1, 1.5 and 2; GPT-J when converted", gated=False, vllm="transformers", llama_cpp="nothing"),
    Family("phi3", "Phi-3, Phi-4"),
    Family(
        "gpt_neox", "GPT-NeoX, Pythia", gated=False, vllm="transformers", llama_cpp="nothing", legacy_names=_NEOX_NAMES
    ),
    Family(
        "gpt_neox_japanese", "GPT-NeoX-Japanese", gated=False, legacy_names=_NEOX_NAMES, vllm="none", llama_cpp="none"
    ),
    Family("falcon", "Falcon (those with RoPE)", gated=False, tied=True, llama_cpp="nothing"),
    Family("stablelm", "StableLM 2", llama_cpp="nothing"),
    Family("olmo2", "OLMo 2", vllm="transformers"),
    Family("olmo3", "OLMo 3", vllm="transformers"),
    Family("granite", "Granite 3"),
    Family("smollm3", "SmolLM3", tied=True, vllm="transformers"),
    Family("cohere", "Command R", tied=True, vllm="pairs", llama_cpp="theta"),
    Family("starcoder2", "StarCoder2", gated=False, tied=True, vllm="transformers"),
    Family("nemotron", "Nemotron, Minitron", gated=False, llama_cpp="linear"),
    Family("glm4", "GLM-4", vllm="pairs"),
    Family(
        "modernbert-decoder",
        "ModernBERT as a decoder (Ettin)",
        tied=True,
        legacy_names=_MODERNBERT_NAMES,
        vllm="none",
        llama_cpp="none",
    ),
    Family("deepseek_v3", "DeepSeek V3 (in plain RoPE)"),
    Family("persimmon", "Persimmon", gated=False, vllm="none", llama_cpp="none"),
    Family("arcee", "Arcee", gated=False, vllm="transformers"),
    Family("apertus", "Apertus", gated=False),
)
# Trained in a loop of one's own (docs/models.md). How vLLM and llama.cpp read them was not looked at.
ENCODERS = (
    Family("modernbert", "ModernBERT, an encoder", tied=True, legacy_names=_MODERNBERT_NAMES),
    Family("eurobert", "EuroBERT, an encoder"),
    Family("nomic_bert", "NomicBERT, an encoder"),
    Family("jina_embeddings_v3", "Jina embeddings v3, an encoder", gated=False),
)
_BY_TYPE = {family.model_type: family for family in (*FAMILIES, *ENCODERS)}

# Why a model type cannot be extended, and what can be done.
_ALIBI = "has ALiBi, a fixed penalty for distance without position ids, which goes on beyond the window."
REFUSED = {
    "gptj": "GPT-J keeps a table of sines of its own that no config changes. Rewrite it first: skipwise convert gptj.",
    "codegen": "CodeGen keeps a table of sines of its own that no config changes.",
    "roformer": "RoFormer keeps a table of sines of its own that no config changes.",
    "baichuan": "Baichuan is remote code. Rewrite it as a Llama first: skipwise convert baichuan.",
    "t5": (
        "T5 adds a learned bias for buckets of relative distance, and has no position ids to skip. To it all distances "
        "beyond its last bucket (128 tokens) look alike, so it reads longer texts as it is."
    ),
    "bloom": f"BLOOM {_ALIBI}",
    "mpt": f"MPT {_ALIBI}",
    "gpt2": "GPT-2 has an embedding for each position, learned, and none beyond its window.",
    "opt": "OPT has an embedding for each position, learned, and none beyond its window.",
    "gpt_neo": "GPT-Neo has an embedding for each position, learned, and none beyond its window.",
    "bert": "BERT has an embedding for each position, learned, and none beyond its window.",
    "mamba": "Mamba has no positions: a state goes from token to token.",
    "mamba2": "Mamba has no positions: a state goes from token to token.",
    "rwkv": "RWKV has no positions: a state goes from token to token.",
}


def why_refused(model_type: str, alibi: bool = False) -> str | None:
    """The reason why a model cannot be extended, as far as its family says so; None if it may be.

    Args:
        alibi: what its config says of that; Falcon has both kinds.
    """
    return f"This {model_type} model {_ALIBI}" if alibi else REFUSED.get(model_type)


def family_of(model_type: str) -> Family:
    """The row of a model type, or one that says nothing particular."""
    return _BY_TYPE.get(model_type, Family(model_type, model_type))


def is_encoder(model_type: str) -> bool:
    """Whether a model type is one of `ENCODERS`."""
    return any(family.model_type == model_type for family in ENCODERS)


def is_tested(model_type: str) -> bool:
    """Whether a model type has a row in `FAMILIES`, or is an encoder that was tested as one."""
    return model_type in _BY_TYPE
