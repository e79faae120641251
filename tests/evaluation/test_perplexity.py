"""Perplexity against an independent reference that scores one token at a time."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from skipwise import UserError
from skipwise.data.held_out import choose_documents
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.evaluation.perplexity import (
    Perplexity,
    TruncatedPerplexity,
    check_one_pass,
)
from skipwise.evaluation.sliding_windows import sliding_windows
from skipwise.evaluation.statistics import Example, bootstrap_ratio, difference, perplexity_results, wilson
from tests.evaluation.conftest import held_out
from tests.picomodels import pico_llama

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(2, 258, size=n) for n in (90, 70, 61)]
MakeContext = Callable[..., EvaluationContext]


@torch.no_grad()
def token_nll(model: PreTrainedModel, context: np.ndarray, token: int) -> float:
    logits = model(torch.from_numpy(context)[None]).logits[0, -1].double()
    return float(-logits.log_softmax(-1)[token])


@given(st.integers(2, 300), st.integers(2, 80), st.integers(1, 100), st.none() | st.integers(1, 320))
@settings(max_examples=300, deadline=None)
def test_every_token_is_predicted_exactly_once(tokens: int, context: int, stride: int, final: int | None) -> None:
    """Trap 9. Seen to fail when overlapping tokens were scored again (`score_from = begin + 1`)."""
    scored = np.zeros(tokens, dtype=int)
    for window in sliding_windows(tokens, context, stride, final):
        assert 0 <= window.begin < window.score_from < window.end <= tokens
        assert window.end - window.begin <= context
        scored[window.score_from : window.end] += 1
        # Full context wherever there is any: more than context - stride tokens, or all there are.
        assert window.score_from - window.begin >= min(window.score_from, context - min(stride, context - 1))
    first = 1 if final is None else max(1, tokens - final)
    assert scored[:first].sum() == 0
    assert (scored[first:] == 1).all()


def measured(tested: ModelUnderTest, spec: Perplexity, context: EvaluationContext) -> dict[int, list[Example]]:
    return {
        int(measurement.context_lengths[0] or 0): list(measurement.measure(set(), measurement.context_lengths))
        for measurement in spec.measurements(tested, context)
    }


def test_sliding_perplexity_is_the_sum_over_tokens(tested: ModelUnderTest, make_context: MakeContext) -> None:
    """Trap 9. Seen to fail with a mean of window means."""
    nll, count = 0.0, 0
    for document in DOCUMENTS:
        end = min(32, len(document))
        for position in range(1, len(document)):
            while position >= end:
                end = min(end + 10, len(document))
            nll += token_nll(tested.model, document[max(0, end - 32) : position], int(document[position]))
            count += 1
    examples = measured(tested, Perplexity(context_lengths=(32,), stride=10), make_context(DOCUMENTS))[32]
    perplexity, bits = perplexity_results(examples)
    assert perplexity["value"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert perplexity["num_samples"] == count
    assert perplexity["interval_low"] < perplexity["value"] < perplexity["interval_high"]
    size = sum(
        len(tested.tokenizer.decode(d).encode()) - len(tested.tokenizer.decode(d[:1]).encode()) for d in DOCUMENTS
    )
    assert bits["value"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert bits["num_samples"] == size


def test_final_tokens_are_the_same_at_every_context_length(tested: ModelUnderTest, make_context: MakeContext) -> None:
    document = DOCUMENTS[0][:64]
    spec = Perplexity(context_lengths=(16, 64), stride=4, final_tokens=8)
    examples = measured(tested, spec, make_context([document]))
    expected = sum(token_nll(tested.model, document[:p], int(document[p])) for p in range(56, 64))
    (long,), (short,) = examples[64], examples[16]
    assert long["nll"] == pytest.approx(expected, rel=1e-5)
    assert short["tokens"] == long["tokens"] == 8
    assert short["nll"] != pytest.approx(long["nll"], rel=1e-3)


def test_truncated_perplexity_of_every_length_from_one_pass(tested: ModelUnderTest, make_context: MakeContext) -> None:
    """Trap 11's cheap form equals a pass per length."""
    lengths = [2, 17, 61]
    spec = TruncatedPerplexity(context_lengths=tuple(lengths))
    (measurement,) = spec.measurements(tested, make_context(DOCUMENTS))
    examples = list(measurement.measure(set(), measurement.context_lengths))
    for length in lengths:
        nll = [
            torch.nn.functional.cross_entropy(
                tested.model(torch.from_numpy(d[:length])[None]).logits[0, :-1].double(), torch.from_numpy(d[1:length])
            ).item()
            for d in DOCUMENTS
        ]
        own = [example for example in examples if example["context_length"] == length]
        result = perplexity_results(own)[0]
        assert result["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
        assert result["num_samples"] == 3 * (length - 1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    ],
)
def test_a_rope_that_depends_on_the_length_takes_no_short_cut(rope: dict[str, object]) -> None:
    """Trap 11. Seen to fail when `length_dependent` said None."""
    parameters = {"rope_theta": 1e4, "original_max_position_embeddings": 64, **rope}
    model = pico_llama(rope_parameters=parameters)
    with pytest.raises(UserError, match="depends on the length"):
        check_one_pass(model, 2)
    check_one_pass(model, 1)
    check_one_pass(pico_llama(), 2)


def test_all_lengths_are_measured_on_the_same_documents(tested: ModelUnderTest, make_context: MakeContext) -> None:
    documents = held_out(DOCUMENTS)
    chosen, reached = choose_documents(documents, (16, 64, 80, 4096), count=5, seed=0)
    assert reached == [16, 64, 80]
    assert [len(document) for document in chosen] == [90]
    chosen, reached = choose_documents(documents, (16, 64), count=5, seed=0)
    assert [len(document) for document in chosen] == [90, 70]
    assert choose_documents(documents, (4096,), count=5, seed=0) == ([], [])
    assert choose_documents(documents, (16,), count=5, seed=0, at_least=70)[0] == documents[:2]
    assert choose_documents(documents, (16,), count=5, seed=0, at_least=1000) == ([], [])
    drawn = [choose_documents(documents, (16,), count=2, seed=seed)[0] for seed in range(10)]
    assert choose_documents(documents, (16,), count=1, seed=0, ids=["0:2", "0:0"])[0] == [documents[0], documents[2]]
    assert choose_documents(documents, (16, 64), count=1, seed=0, ids=["0:2", "0:0"]) == ([documents[0]], [16, 64])
    assert drawn[0] == choose_documents(documents, (16,), count=2, seed=0)[0]
    assert len({tuple(document.id for document in one) for one in drawn}) == 3

    context = make_context(DOCUMENTS)
    list(Perplexity(context_lengths=(16, 4096)).measurements(tested, context))
    assert context.log == ["no perplexity at 4,096 tokens: no document is that long"]  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("scale", [1e6, math.nan])
def test_a_broken_model_has_no_perplexity(tested: ModelUnderTest, make_context: MakeContext, scale: float) -> None:
    """The runner makes a failed row of it."""
    model = pico_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    spec = Perplexity(context_lengths=(32,), stride=8)
    examples = measured(replace(tested, model=model), spec, make_context(DOCUMENTS))[32]
    with pytest.raises(UserError, match="the model is broken"):
        perplexity_results(examples)


def test_wilson_against_published_numbers() -> None:
    """Newcombe (1998), Table I: 81 of 263 and 15 of 148, 0 of 20, 1 of 29."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_against_the_linearised_error_of_a_ratio() -> None:
    """Cochran (1977), Section 6.3."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 200, size=400).astype(float)
    sums = sizes * rng.normal(3.0, 0.4, size=400)
    ratio = sums.sum() / sizes.sum()
    error = np.sqrt(((sums - ratio * sizes) ** 2).sum() * 400 / 399) / sizes.sum()
    drawn = bootstrap_ratio(sums, sizes)
    assert drawn.mean() == pytest.approx(ratio, rel=1e-3)
    assert drawn.std() == pytest.approx(error, rel=0.1)


def test_paired_differences_know_what_is_shared() -> None:
    """Documents differ a lot, models by a constant: each alone is uncertain, their difference is not."""
    nll = np.random.default_rng(0).normal(300, 60, size=20)
    one = [{"context_length": 8, "example": str(i), "nll": n, "tokens": 100, "bytes": 400} for i, n in enumerate(nll)]
    other = [{**example, "nll": float(example["nll"]) + 10} for example in one]
    alone = perplexity_results(one)[0]
    result = difference(one, other[5:])
    assert result is not None
    assert result["metric"] == "perplexity"
    assert result["num_samples"] == 15
    mean = nll[5:].mean() / 100
    assert result["value"] == pytest.approx(math.exp(mean + 0.1) - math.exp(mean))
    assert result["interval_high"] - result["interval_low"] < 0.3 * (alone["interval_high"] - alone["interval_low"])
    assert result["interval_low"] > 0
    assert difference(one, []) is None
    assert difference(one, [{**example, "prompt": "another"} for example in other]) is None
    fewer_tokens = [{**example, "tokens": 50} for example in other]
    bits = difference(one, fewer_tokens)
    assert bits is not None
    assert (bits["metric"], bits["value"]) == ("bits_per_byte", pytest.approx(10 / 400 / math.log(2)))
    # Key tokens of a text have no bytes of their own, so other tokens are no comparison.
    assert difference(one, [{**example, "bytes": 0} for example in fewer_tokens]) is None
