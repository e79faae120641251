"""Passkey prompts and their verdict."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import UserError
from skipwise.evaluation.passkey import filler_units, is_retrieved, make_trials, passkey_figures
from skipwise.evaluation.specs import Passkey
from tests.conftest import pico_llama


@pytest.mark.parametrize("length", [400, 1000, 4096])
def test_prompts_fill_the_context_and_no_more(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    trials = make_trials(tokenizer, length, 10, seed=0)
    assert {len(trial.ids) for trial in trials} == {len(trials[0].ids)}
    assert length - 100 < len(trials[0].ids) <= length
    depths = [tokenizer.decode(trial.ids).index("The pass key is") / len(trial.ids) for trial in trials]
    assert depths == sorted(depths)
    if length > 1000:
        assert depths[0] < 0.15
        assert depths[-1] > 0.85


def test_the_answer_is_the_hidden_key(tokenizer: PreTrainedTokenizerFast) -> None:
    for trial in make_trials(tokenizer, 1000, 20, seed=0):
        key = tokenizer.decode(trial.ids[-trial.answer :]).strip()
        assert len(key) == 5
        assert key.isdigit()
        text = tokenizer.decode(trial.ids[: -trial.answer])
        assert text.count(key) == 2
        assert f" The pass key is {key}. Remember it. {key} is the pass key." in text
        assert text.endswith(" What is the pass key? The pass key is")


def test_the_same_seed_gives_the_same_trials(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_trials(tokenizer, 600, 5, seed=3) == make_trials(tokenizer, 600, 5, seed=3)
    assert make_trials(tokenizer, 600, 5, seed=3) != make_trials(tokenizer, 600, 5, seed=4)


def test_a_context_too_short_for_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="needs at least"):
        filler_units(tokenizer, 100)


def test_the_verdict_is_that_of_greedy_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    """On answers of which a random model gets the first tokens right or not: against `generate`."""
    model = pico_llama(max_position_embeddings=1024)
    verdicts = []
    for trial in make_trials(tokenizer, 350, 6, seed=0):
        prompt = trial.ids[: -trial.answer]
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        greedy = written[0, len(prompt) :].tolist()
        for kept in range(7):  # the first `kept` tokens as decoded, then the true ones
            answer = greedy[:kept] + trial.ids[-6:][kept:]
            forced = type(trial)(ids=prompt + answer, answer=6, depth=0.0)
            verdicts.append(is_retrieved(model, [forced])[0])
            assert verdicts[-1] == (answer == greedy)
    assert True in verdicts
    assert False in verdicts


def test_figures_by_depth_add_up(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: Any) -> None:
    from skipwise.evaluation import passkey

    monkeypatch.setattr(passkey, "is_retrieved", lambda model, trials: [trial.depth > 0.5 for trial in trials])
    pooled, *by_depth = passkey_figures(llama, tokenizer, Passkey(context_lengths=(600,), trials=20), 600, seed=0)
    assert pooled["value"] == 0.5
    assert pooled["depth"] is None
    assert [(row["depth"], row["value"], row["num_samples"]) for row in by_depth] == [
        (pytest.approx(0.1), 0.0, 4),
        (pytest.approx(0.3), 0.0, 4),
        (pytest.approx(0.5), 0.5, 4),
        (pytest.approx(0.7), 1.0, 4),
        (pytest.approx(0.9), 1.0, 4),
    ]
