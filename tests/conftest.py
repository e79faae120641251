"""Models and tokenizers small enough to make on the fly. Nothing is downloaded."""

import os
import sys

from tests.picomodels import byte_tokenizer, pico_llama

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
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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
