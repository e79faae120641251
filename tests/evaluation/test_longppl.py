"""LongPPL: which tokens are key tokens, and that every model is measured on the same ones."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from skipwise import UserError
from skipwise.evaluation import longppl
from skipwise.evaluation.longppl import LongPPL, key_tokens, longppl_results, tokens_of, within
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from tests.picomodels import pico_llama

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 2


@pytest.fixture
def documents(tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    return [np.array(tokenizer(text)["input_ids"]) for text in (TEXT, TEXT.upper())]


@torch.no_grad()
def test_key_tokens_against_a_loop_over_tokens(tested: ModelUnderTest) -> None:
    """Every token once with all that stands before it, once with its last 20 to 27 tokens only."""
    spec = LongPPL(context_lengths=(64,), evaluator="x", short_context=20, stride=8, alpha=0.3, beta=-9.0)
    ids = tested.tokenizer(TEXT)["input_ids"][:64]

    def log_prob(context: list[int], token: int) -> float:
        logits = tested.model(torch.tensor([context])).logits[0, -1].double()
        return float(logits.log_softmax(-1)[token])

    expected, window_end = [], 28
    for i in range(1, 64):
        while i >= window_end:
            window_end = min(64, window_end + 8)
        start = max(0, window_end - 28)
        long, short = log_prob(ids[:i], ids[i]), log_prob(ids[start:i], ids[i])
        if long - short > 0.3 and long > -9:
            expected.append([i, i + 1])  # a token is a byte here
    end, keys = longppl.choose_key_spans(tested.model, tested.tokenizer, TEXT, spec, 64)
    assert end == 64
    assert keys == expected
    assert 0 < len(keys) < 40
    assert longppl.choose_key_spans(tested.model, tested.tokenizer, TEXT[:50], spec, 64) == (0, [])


def test_both_thresholds_count() -> None:
    long, short = np.array([-1.0, -1.0, -2.5, -1.0]), np.array([-4.0, -2.9, -9.0, -1.0])
    assert key_tokens(long, short, alpha=2.0, beta=-2.0).tolist() == [True, False, False, False]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.sets(st.integers(0, 80)))
def test_tokens_of_another_tokenizer_find_the_keys(sizes: list[int], key_characters: set[int]) -> None:
    ends = np.cumsum(sizes)
    spans = np.stack([ends - sizes, ends], axis=1)
    keys = [[c, c + 1] for c in sorted(key_characters)]
    expected = [any(start <= c < end for c in key_characters) for start, end in spans.tolist()]
    assert within(spans, keys).tolist() == expected


def test_key_tokens_are_chosen_once_and_shared(
    tested: ModelUnderTest, make_context: Callable[..., EvaluationContext], documents: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch, pico_directory: Path,
) -> None:  # fmt: skip
    spec = LongPPL(
        context_lengths=(64,), evaluator=str(pico_directory), short_context=20, stride=8, alpha=0.3, beta=-9.0
    )
    context = make_context(documents)
    (measurement,) = spec.measurements(tested, context)
    examples = list(measurement.measure(set(), measurement.context_lengths))
    assert len(examples) == 2

    def no_second_time(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("skipwise.models.load.load_model", no_second_time)
    other = replace(tested, model=pico_llama(initializer_range=0.3))
    (measurement,) = spec.measurements(other, context)
    again = list(measurement.measure(set(), measurement.context_lengths))
    assert [e["tokens"] for e in again] == [e["tokens"] for e in examples]
    assert [e["nll"] for e in again] != [e["nll"] for e in examples]

    # Against the definition: the mean loss of the stored pieces, with the whole context.
    lines = context.shared.read("longppl-64")
    assert lines is not None
    nll, count = 0.0, 0
    for text, line in zip((TEXT, TEXT.upper()), lines, strict=True):
        ids = torch.tensor([tested.tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            log_probs = tested.model(ids).logits[0].double().log_softmax(-1)
        for start, _ in line["keys"]:
            nll -= float(log_probs[start - 1, ids[0, start]])
            count += 1
    result = longppl_results(examples)[0]
    assert result["value"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result["num_samples"] == count


def test_wrong_evaluators(
    tested: ModelUnderTest,
    make_context: Callable[..., EvaluationContext],
    documents: list[np.ndarray],
    pico_directory: Path,
) -> None:
    spec = LongPPL(context_lengths=(100,), evaluator=str(pico_directory), short_context=20)
    (measurement,) = spec.measurements(tested, make_context(documents))
    with pytest.raises(UserError, match="100 tokens are more than the 64"):
        list(measurement.measure(set(), measurement.context_lengths))
    with pytest.raises(UserError, match="short_context must be below"):
        LongPPL(context_lengths=(100,), evaluator="x", short_context=100)
    with pytest.raises(UserError, match="no token that needs"):
        longppl_results([])


def test_offsets_without_the_end_of_text_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens_of(tokenizer, "abc").spans.tolist() == [[0, 1], [1, 2], [2, 3]]
    ending = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = ending
    tokens = tokens_of(tokenizer, "abc")
    assert tokens.ids.tolist()[0] == 0
    assert 1 not in tokens.ids
    assert tokens.spans.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
