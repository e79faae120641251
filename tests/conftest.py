"""Models and tokenizers small enough to make on the fly. Nothing is downloaded."""

import os
import sys

# Before torch is imported. Tests run side by side, each with one thread; more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compute on the CPU, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Operators that DeepSpeed compiles, which the tests build once for their environment.
os.environ["TORCH_EXTENSIONS_DIR"] = f"{sys.prefix}/torch-extensions"
# Before transformers is imported: a test that reaches for a hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 258  # every byte, and two special tokens
WINDOW = 64
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


# Imported by the process that others are forked from, and by nobody else.
collect_ignore = ["preload.py"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove the locks of builds that were killed: the next one would wait for them for ever."""
    from skipwise.training.builds import build_folder, stale_locks

    for lock in stale_locks(build_folder()):
        lock.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def llama() -> PreTrainedModel:
    return pico_llama()


@pytest.fixture
def pico_directory(tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model directory as a user has it."""
    path = tmp_path / "pico"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A dozen documents of a thousand bytes."""
    import json

    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"document {i}: " + " ".join(str(i * j) for j in range(250))}) for i in range(12)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config_file(tmp_path: Path, pico_directory: Path, text_file: Path) -> Path:
    """A run of a few seconds."""
    evaluate = [
        {"name": "perplexity", "context_lengths": [64, 256], "stride": 32, "documents": 2, "final_tokens": 32},
        {"name": "truncated_perplexity", "context_lengths": [64, 256], "documents": 2},
        {"name": "passkey", "context_lengths": [64, 512], "trials": 5},
    ]
    values = {
        "model": {"path": str(pico_directory), "dtype": "float32"},
        "lengths": {"target": 512},
        "data": {"source": str(text_file), "held_out_share": 0.3, "retrieval_share": 0.25},
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2},
        "evaluate": evaluate,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def largest_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The largest position of every batch that is drawn in this process, as they come."""
    from skipwise import WindowCollator

    draw, largest = WindowCollator.__call__, []

    def watched(self: WindowCollator, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = draw(self, features)
        largest.append(int(batch["position_ids"].max()))
        return batch

    monkeypatch.setattr(WindowCollator, "__call__", watched)
    return largest
