"""What jobs cost, counted and not timed: forward passes, tokens read, logits at once, windows drawn.

A change that makes a job slower shows here before anybody measures it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from skipwise import Document, Lengths, PoSE, Window, WindowCollator
from skipwise.data.store import Documents
from skipwise.data.windows import Source, TrainingExamples, cut_spans
from skipwise.evaluation import inference as reading
from skipwise.evaluation.inference import score_endings
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity, TruncatedPerplexity
from skipwise.evaluation.runner import evaluate
from skipwise.evaluation.specs import EvaluationSpec
from skipwise.models.forward import CHUNK_ROWS
from skipwise.runs.directory import ExampleLog
from skipwise.training.config import TrainConfig
from skipwise.training.trainer import Teacher, train, training_arguments
from tests.picomodels import VOCABULARY, pico_llama

LENGTHS = Lengths(original=64, train=32, target=256)
WINDOWS = 24  # of a step: more tokens than logits may exist for
LOGIT_BYTES = CHUNK_ROWS * VOCABULARY * 4


@dataclass
class Work:
    """Of one or several models."""

    passes: int = 0
    tokens: int = 0
    logit_bytes: int = 0
    windows: int = 0


class _Logits(TorchDispatchMode):
    """The largest tensor with a number for each word of the vocabulary, that is not a weight or its gradient."""

    def __init__(self, work: Work, hidden_size: int) -> None:
        super().__init__()
        self.work, self.hidden_size = work, hidden_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        of_words = isinstance(out, torch.Tensor) and out.dim() > 0 and out.shape[-1] == VOCABULARY
        if of_words and self.hidden_size not in out.shape:
            self.work.logit_bytes = max(self.work.logit_bytes, out.numel() * out.element_size())
        return out


@contextmanager
def counted(*models: PreTrainedModel) -> Iterator[Work]:
    work = Work()

    def before(module: object, args: object, keywords: dict[str, torch.Tensor]) -> None:
        ids = keywords["input_ids"]
        work.passes += 1
        work.tokens += ids.numel()

    hooks = [model.model.register_forward_pre_hook(before, with_kwargs=True) for model in models]
    try:
        with _Logits(work, models[0].config.hidden_size):
            yield work
    finally:
        for hook in hooks:
            hook.remove()


class CountingPoSE:
    """PoSE that counts its windows."""

    name = "pose"
    has_skips = True
    needs_sentences = False

    def __init__(self, work: Callable[[], Work]) -> None:
        self.work = work

    def tokens_needed(self, lengths: Lengths) -> int:
        return lengths.train

    def tokens_used(self, lengths: Lengths) -> int:
        return lengths.train

    def sample(self, document: Document, lengths: Lengths, rng: np.random.Generator) -> Window:
        self.work().windows += 1
        return PoSE().sample(document, lengths, rng)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_training_step(teacher: bool, tmp_path: Path) -> None:
    """One pass over its windows (and one of the teacher), no more logits than a chunk's, a draw for each window."""
    rng = np.random.default_rng(0)
    documents = Documents(rng.integers(2, 258, size=2000), np.array([0]), np.array([2000]))
    source = Source(documents, cut_spans(documents, 32, 32, False), 1.0)
    steps, models = 2, [pico_llama(), *([pico_llama()] if teacher else [])]
    arguments = training_arguments(
        TrainConfig(max_steps=steps, per_device_train_batch_size=WINDOWS),
        tmp_path,
        0,
        torch.float32,
        torch.device("cpu"),
    )
    with counted(*models) as work:
        train(
            model=models[0],
            arguments=arguments,
            dataset=TrainingExamples([source], steps * WINDOWS, seed=0),
            collator=WindowCollator(CountingPoSE(lambda: work), LENGTHS),  # type: ignore[arg-type]
            eval_dataset=None,
            callbacks=[],
            teacher=Teacher(models[1], 1.0) if teacher else None,
        )
    assert work.passes == steps * len(models)
    assert work.tokens == steps * len(models) * WINDOWS * LENGTHS.train
    assert work.windows == steps * WINDOWS
    assert 0 < work.logit_bytes <= LOGIT_BYTES < WINDOWS * LENGTHS.train * VOCABULARY * 4


TEXTS = [np.random.default_rng(index).integers(2, 258, size=200) for index in range(3)]


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        # Every length from one pass over each text.
        (TruncatedPerplexity(context_lengths=(16, 64, 128), documents=3), 128),
        # A window per stride: 64 tokens, then 16 more after 48 others, until 200.
        (Perplexity(context_lengths=(64,), stride=16, documents=3), 64 * (1 + math.ceil((200 - 64) / 16))),
        # Texts as long as the longest context; the last 32 tokens are two strides of the shorter one.
        (Perplexity(context_lengths=(64, 128), stride=16, documents=3, final_tokens=32), 2 * 64 + 128),
    ],
)
def test_perplexities(
    spec: EvaluationSpec,
    tokens: int,
    tested: ModelUnderTest,
    make_context: Callable[..., EvaluationContext],
    tmp_path: Path,
) -> None:
    list(score_endings(tested.model, [([2, 3, 4], 1)], [True]))  # asks it, once, whether it can be read in pieces
    with counted(tested.model) as work:
        rows = list(evaluate(tested, (spec,), make_context(TEXTS), ExampleLog(tmp_path / "examples"), set()))
    assert rows
    assert work.tokens == len(TEXTS) * tokens
    assert work.logit_bytes <= reading.MOST_LOGITS * 4


def test_passkeys_share_their_beginnings(
    tested: ModelUnderTest, make_context: Callable[..., EvaluationContext], tmp_path: Path
) -> None:
    """Prompts of one length differ from where the key stands: half of the text on average."""
    trials, length = 20, 600
    with counted(tested.model) as work:
        spec = Passkey(context_lengths=(length,), trials=trials)
        list(evaluate(tested, (spec,), make_context(), ExampleLog(tmp_path / "examples"), set()))
    assert work.tokens < 0.65 * trials * length
