"""Perplexity against an independent reference that scores one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from skipwise import UserError
from skipwise.evaluation.intervals import ratio_with_error, wilson
from skipwise.evaluation.perplexity import (
    choose_documents,
    perplexity_figures,
    sliding_windows,
    truncated_perplexity_figures,
)
from skipwise.evaluation.specs import Perplexity
from tests.conftest import pico_llama

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(2, 258, size=n) for n in (90, 70, 61)]


@torch.no_grad()
def token_nll(model: PreTrainedModel, context: np.ndarray, token: int) -> float:
    logits = model(torch.from_numpy(context)[None]).logits[0, -1].double()
    return float(-logits.log_softmax(-1)[token])


@given(st.integers(2, 300), st.integers(2, 80), st.integers(1, 100), st.none() | st.integers(1, 320))
@settings(max_examples=300, deadline=None)
def test_every_token_is_predicted_exactly_once(tokens: int, context: int, stride: int, final: int | None) -> None:
    """Trap 9. Seen to fail when overlapping tokens were scored again (`score_from = begin + 1`)."""
    scored = np.zeros(tokens, dtype=int)
    for slide in sliding_windows(tokens, context, stride, final):
        assert 0 <= slide.begin < slide.score_from < slide.end <= tokens
        assert slide.end - slide.begin <= context
        scored[slide.score_from : slide.end] += 1
        # Full context wherever there is any: more than context - stride tokens, or all there are.
        assert slide.score_from - slide.begin >= min(slide.score_from, context - min(stride, context - 1))
    first = 1 if final is None else max(1, tokens - final)
    assert scored[:first].sum() == 0
    assert (scored[first:] == 1).all()


def test_sliding_perplexity_is_the_sum_over_tokens(llama: PreTrainedModel) -> None:
    """Trap 9. Seen to fail with a mean of window means."""
    spec = Perplexity(context_lengths=(32,), stride=10)
    nll, count = 0.0, 0
    for document in DOCUMENTS:
        end = min(32, len(document))
        for position in range(1, len(document)):
            while position >= end:
                end = min(end + 10, len(document))
            nll += token_nll(llama, document[max(0, end - 32) : position], int(document[position]))
            count += 1
    figures = perplexity_figures(llama, DOCUMENTS, spec, 32)
    assert figures["value"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert figures["num_samples"] == count
    assert figures["interval_low"] < figures["value"] < figures["interval_high"]


def test_final_tokens_are_the_same_at_every_context_length(llama: PreTrainedModel) -> None:
    document = DOCUMENTS[0][:64]
    spec = Perplexity(context_lengths=(16, 64), stride=4, final_tokens=8)
    long = perplexity_figures(llama, [document], spec, 64)
    expected = [token_nll(llama, document[:p], int(document[p])) for p in range(56, 64)]
    assert long["value"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    short = perplexity_figures(llama, [document], spec, 16)
    assert short["num_samples"] == long["num_samples"] == 8
    assert short["value"] != pytest.approx(long["value"], rel=1e-3)


def test_truncated_perplexity_of_every_length_from_one_pass(llama: PreTrainedModel) -> None:
    """Trap 11's cheap form equals a pass per length."""
    lengths = [2, 17, 61]
    figures = truncated_perplexity_figures(llama, DOCUMENTS, lengths)
    for length in lengths:
        nll = [
            torch.nn.functional.cross_entropy(
                llama(torch.from_numpy(d[:length])[None]).logits[0, :-1].double(), torch.from_numpy(d[1:length])
            ).item()
            for d in DOCUMENTS
        ]
        assert figures[length]["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
        assert figures[length]["num_samples"] == 3 * (length - 1)


def test_all_lengths_are_measured_on_the_same_documents() -> None:
    chosen, reached = choose_documents(DOCUMENTS, (16, 64, 80, 4096), count=5)
    assert reached == [16, 64, 80]
    assert [len(document) for document in chosen] == [90]
    chosen, reached = choose_documents(DOCUMENTS, (16, 64), count=5)
    assert [len(document) for document in chosen] == [90, 70]
    assert choose_documents(DOCUMENTS, (4096,), count=5) == ([], [])


@pytest.mark.parametrize("scale", [1e6, math.nan])
def test_a_broken_model_has_no_perplexity(scale: float) -> None:
    """The runner makes a failed row of it."""
    model = pico_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    with pytest.raises(UserError, match="the model is broken"):
        perplexity_figures(model, DOCUMENTS, Perplexity(context_lengths=(32,), stride=8), 32)


def test_wilson_against_published_numbers() -> None:
    """Newcombe (1998), Table I: 81 of 263 and 15 of 148, 0 of 20, 1 of 29."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_ratio_error_against_resampling() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 200, size=400).astype(float)
    sums = sizes * rng.normal(3.0, 0.4, size=400)
    ratio, error = ratio_with_error(sums, sizes)
    draws = rng.integers(400, size=(2000, 400))
    resampled = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    assert ratio == pytest.approx(sums.sum() / sizes.sum())
    assert error == pytest.approx(resampled.std(), rel=0.1)
    assert ratio_with_error(sums[:1], sizes[:1])[1] is None
