"""The embedded model must be a fair stand-in for a real one."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipwise.data.config import DataConfig, SourceConfig
from skipwise.data.store import open_store
from skipwise.evaluation.passkey import count_retrieved, make_trials
from skipwise.evaluation.perplexity import sliding_log_probs
from skipwise.evaluation.prompts import encoder
from skipwise.evaluation.sliding_windows import sliding_windows
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_model, load_tokenizer
from skipwise.models.locate import TINY
from skipwise.models.rope import read_rope

WINDOW = 256


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = ModelConfig(path=TINY)
    return load_model(config, torch.device("cpu")), load_tokenizer(config)


def accuracy(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], length: int, trials: int) -> float:
    model, tokenizer = tiny
    return count_retrieved(model, make_trials(encoder(tokenizer, chat=False), length, trials, seed=11)) / trials


def test_it_is_small_and_has_a_short_window(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = tiny
    assert model.num_parameters() < 5e6
    assert read_rope(model.config).original == read_rope(model.config).current == WINDOW
    assert tokenizer("x 407")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer("407", add_special_tokens=False)["input_ids"]) == 3  # single digits


@pytest.mark.parametrize("length", [128, WINDOW])
def test_it_retrieves_inside_its_window(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], length: int) -> None:
    assert accuracy(tiny, length, trials=100) >= 0.95


def test_it_fails_beyond(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    assert accuracy(tiny, 4 * WINDOW, trials=40) <= 0.3
    assert accuracy(tiny, 16 * WINDOW, trials=10) <= 0.1


def test_its_perplexity_rises_past_its_window(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = tiny
    data = DataConfig(sources=(SourceConfig(source="builtin:python"),))
    held_out = open_store(data.sources[0], data, tokenizer).held_out
    longest = held_out.lengths.argsort()[::-1][:6]
    documents = [held_out.read(int(held_out.starts[i]), int(held_out.starts[i]) + 2048) for i in longest]
    inside, beyond = (
        np.exp(-np.mean([sliding_log_probs(model, d, sliding_windows(len(d), length, 32, 64)) for d in documents]))
        for length in (WINDOW, 2048)
    )
    assert inside < 60
    assert beyond > 1.5 * inside
