"""Passkey retrieval: a number hidden in a long text, asked for at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.errors import UserError
from skipwise.evaluation.intervals import wilson
from skipwise.evaluation.specs import Passkey
from skipwise.models.forward import log_probabilities

# Wording of Mohtashami & Jaggi (arXiv 2305.16300), as in Figure 2a of the PoSE paper.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"

BATCH_TOKENS = 16_384
DEPTH_BINS = 5


@dataclass(frozen=True)
class Trial:
    """One prompt with its answer.

    Attributes:
        ids: tokens of prompt and answer.
        answer: how many of them, at the end, are the answer.
        depth: where the key stands, 0 at the beginning and 1 at the end of the filler.
    """

    ids: list[int]
    answer: int
    depth: float


def passkey_text(units: int, depth: float, key: str) -> str:
    """The prompt with `units` repetitions of the filler, without the answer."""
    before = round(depth * units)
    return TASK + FILLER * before + NEEDLE.format(key=key) + FILLER * (units - before) + QUESTION


def filler_units(tokenizer: PreTrainedTokenizerBase, context_length: int) -> int:
    """The largest number of filler repetitions with which prompt and answer fit.

    Raises:
        UserError: when they do not fit even without filler.
    """

    def size(units: int) -> int:
        return len(tokenizer(f"{passkey_text(units, 0.5, '12345')} 12345", verbose=False)["input_ids"])

    empty = size(0)
    if empty > context_length:
        raise UserError(
            f"A passkey prompt needs at least {empty} tokens with this tokenizer, but the context length is "
            f"{context_length}. Evaluate longer contexts."
        )
    per_unit = (size(16) - empty) / 16
    units = int((context_length - empty) / per_unit)
    while units > 0 and size(units) > context_length:
        units -= 1
    return units


def make_trials(tokenizer: PreTrainedTokenizerBase, context_length: int, trials: int, seed: int) -> list[Trial]:
    """Trials of one length: random keys at depths spread evenly; the same for the same seed."""
    units = filler_units(tokenizer, context_length)
    rng = np.random.default_rng(np.random.SeedSequence((seed, context_length)))
    return [
        make_trial(tokenizer, units, depth=(i + 0.5) / trials, key="".join(map(str, rng.integers(0, 10, size=5))))
        for i in range(trials)
    ]


def make_trial(tokenizer: PreTrainedTokenizerBase, units: int, depth: float, key: str) -> Trial:
    """Tokenise one prompt and its answer, together, as a text is read."""
    text = passkey_text(units, depth, key)
    ids = tokenizer(f"{text} {key}", verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    prompt = tokenizer(text, verbose=False)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
    return Trial(ids=ids, answer=len(ids) - shared, depth=depth)


def is_retrieved(model: PreTrainedModel, trials: list[Trial]) -> list[bool]:
    """Whether the greedy answer begins with the key, for trials of one length in tokens.

    One pass over prompt and answer decides it: greedy decoding writes the key exactly if every token
    of it is the first choice after the right ones before it.
    """
    ids = torch.tensor([trial.ids for trial in trials])
    answers = torch.tensor([trial.answer for trial in trials])
    scored = torch.arange(ids.shape[1]) >= ids.shape[1] - answers[:, None]
    _, greedy = log_probabilities(model, ids, scored)
    return [bool(part.all()) for part in torch.split(greedy, answers.tolist())]


def passkey_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: Passkey,
    context_length: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Accuracy at one length: pooled, and by depth in `DEPTH_BINS` bins; keys are those of `EvalResult`."""
    trials = make_trials(tokenizer, context_length, spec.trials, seed)
    groups: dict[int, list[Trial]] = {}
    for trial in trials:  # digits may merge into fewer tokens, and a batch needs one length
        groups.setdefault(len(trial.ids), []).append(trial)
    hits: list[tuple[float, bool]] = []
    for width, group in groups.items():
        size = max(1, BATCH_TOKENS // width)
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            hits += zip((trial.depth for trial in batch), is_retrieved(model, batch), strict=True)
            on_step()
    bins = min(DEPTH_BINS, spec.trials)
    by_depth = [[hit for depth, hit in hits if int(depth * bins) == number] for number in range(bins)]
    return [
        _figures(None, [hit for _, hit in hits]),
        *(_figures((number + 0.5) / bins, group) for number, group in enumerate(by_depth)),
    ]


def _figures(depth: float | None, hits: list[bool]) -> dict[str, Any]:
    share = sum(hits) / len(hits)
    low, high = wilson(sum(hits), len(hits))
    return {
        "metric": "accuracy",
        "depth": depth,
        "value": share,
        "stderr": math.sqrt(share * (1 - share) / len(hits)),
        "interval_low": low,
        "interval_high": high,
        "num_samples": len(hits),
    }
