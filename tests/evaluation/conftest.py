"""A model under test and an evaluation context, as evaluations get them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise.data.held_out import HeldOut, HeldOutDocument
from skipwise.data.store import Documents
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.runs.directory import SharedFiles


class Said(list[str]):
    """Remembers what stays on the screen."""

    def __call__(self, text: str, *, detail: str = "", stay: bool = False) -> None:
        if stay:
            self.append(text)


def held_out(arrays: Sequence[np.ndarray]) -> list[HeldOutDocument]:
    stops = np.cumsum([len(array) for array in arrays])
    documents = Documents(np.concatenate(arrays).astype(np.uint16), stops - [len(a) for a in arrays], stops)
    return [HeldOutDocument(f"0:{i}", documents, int(documents.starts[i]), int(stops[i])) for i in range(len(arrays))]


@pytest.fixture
def tested(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ModelUnderTest:
    return ModelUnderTest(llama, tokenizer, "original", "pico", window=64, dtype=torch.float32)


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., EvaluationContext]:
    def make(arrays: Sequence[np.ndarray] = (), **changes: Any) -> EvaluationContext:
        documents = held_out(arrays) if len(arrays) else []
        settings = {"held_out": HeldOut("texts", documents), "seed": 0, "shared": SharedFiles(tmp_path), "log": Said()}
        return EvaluationContext(**{**settings, **changes})

    return make
