"""Passkey prompts and their verdict."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import UserError
from skipwise.evaluation.passkey import (
    Passkey,
    check_representable,
    filler_repeats,
    greedy_answers,
    make_trials,
    passkey_results,
)
from skipwise.evaluation.prompts import Encode, encoder
from skipwise.evaluation.statistics import Example
from tests.picomodels import pico_llama, pico_neox


@pytest.fixture
def encode(tokenizer: PreTrainedTokenizerFast) -> Encode:
    return encoder(tokenizer, chat=False)


@pytest.mark.parametrize("length", [400, 1000, 4096])
def test_prompts_fill_the_context_and_no_more(tokenizer: PreTrainedTokenizerFast, encode: Encode, length: int) -> None:
    trials = make_trials(encode, length, 10, seed=0)
    assert {len(trial.ids) for trial in trials} == {len(trials[0].ids)}
    assert length - 100 < len(trials[0].ids) <= length
    depths = [tokenizer.decode(trial.ids).index("The pass key is") / len(trial.ids) for trial in trials]
    assert depths == sorted(depths)
    if length > 1000:
        assert depths[0] < 0.15
        assert depths[-1] > 0.85


def test_the_answer_is_the_hidden_key(tokenizer: PreTrainedTokenizerFast, encode: Encode) -> None:
    for trial in make_trials(encode, 1000, 20, seed=0):
        key = tokenizer.decode(trial.ids[-trial.answer :]).strip()
        assert key == trial.key
        assert len(key) == 5
        assert key.isdigit()
        text = tokenizer.decode(trial.ids[: -trial.answer])
        assert text.count(key) == 2
        assert f" The pass key is {key}. Remember it. {key} is the pass key." in text
        assert text.endswith(" What is the pass key? The pass key is")


def test_several_keys_share_a_prompt(tokenizer: PreTrainedTokenizerFast, encode: Encode) -> None:
    """Each asked for by its door; the prompt in front of the question is the same, so it is read once."""
    trials = make_trials(encode, 2000, 10, seed=0, keys_per_prompt=5)
    assert [trial.depth for trial in trials] == [0.1, 0.3, 0.5, 0.7, 0.9] * 2
    texts = [tokenizer.decode(trial.ids[: -trial.answer]) for trial in trials]
    for half in (slice(0, 5), slice(5, 10)):
        before = {text[: text.index(" What is")] for text in texts[half]}
        assert len(before) == 1
        for trial, text in zip(trials[half], texts[half], strict=True):
            door = re.search(r"the pass key of the (\w+) door is$", text, re.IGNORECASE)
            assert door is not None
            assert f" The pass key of the {door[1]} door is {trial.key}." in text
            assert text.count(trial.key) == 2
    assert 1900 < max(len(trial.ids) for trial in trials) <= 2000


@pytest.mark.parametrize(("keys", "trials"), [(3, 10), (17, 34), (0, 10)])
def test_a_number_of_keys_that_does_not_fit(keys: int, trials: int) -> None:
    with pytest.raises(UserError, match="keys_per_prompt"):
        Passkey(context_lengths=(1000,), trials=trials, keys_per_prompt=keys)


def test_the_same_seed_gives_the_same_trials(encode: Encode) -> None:
    assert make_trials(encode, 600, 5, seed=3) == make_trials(encode, 600, 5, seed=3)
    assert make_trials(encode, 600, 5, seed=3) != make_trials(encode, 600, 5, seed=4)


def test_a_context_too_short_for_the_prompt(encode: Encode) -> None:
    with pytest.raises(UserError, match="needs at least"):
        filler_repeats(encode, 100)


def test_digits_that_merge(tokenizer: PreTrainedTokenizerFast) -> None:
    """The answer is what follows the prompt, however many tokens it is."""
    merging = _tokenizer_with([("1", "2"), ("12", "3"), ("Ġ", "4")])
    encode = encoder(merging, chat=False)
    lengths = set()
    for trial in [*make_trials(encode, 1000, 40, seed=0), *make_trials(encode, 509, 40, seed=0)]:
        assert merging.decode(trial.ids[-trial.answer :]) == f" {trial.key}"
        lengths.add(trial.answer)
    assert len(lengths) > 1


@pytest.mark.parametrize("length", range(480, 560, 7))
def test_no_prompt_is_longer_than_the_context(length: int) -> None:
    """Even when the key that was measured with is one token. Seen to fail when only that one was."""
    encode = encoder(_tokenizer_with([("1", "2"), ("12", "3"), ("123", "4"), ("1234", "5")]), chat=False)
    assert max(len(trial.ids) for trial in make_trials(encode, length, 10, seed=0)) <= length


def test_a_tokenizer_that_loses_digits_is_refused(tokenizer: PreTrainedTokenizerFast, encode: Encode) -> None:
    check_representable(tokenizer, encode)
    poor = _tokenizer_with([], alphabet=[c for c in pre_tokenizers.ByteLevel.alphabet() if not c.isdigit()])
    with pytest.raises(UserError, match="loses words or digits"):
        check_representable(poor, encoder(poor, chat=False))


def _tokenizer_with(merges: list[tuple[str, str]], alphabet: list[str] | None = None) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else sorted(alphabet)
    tokens = ["<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make_model", [partial(pico_llama, max_position_embeddings=1024), pico_neox])
def test_the_verdict_is_that_of_greedy_decoding(encode: Encode, make_model: Any) -> None:
    """Against `generate`, on answers of which a random model gets the first tokens right or not."""
    model = make_model()
    forced, greedy = [], []
    for trial in make_trials(encode, 500, 6, seed=0):
        prompt = trial.ids[: -trial.answer]
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        own = written[0, len(prompt) :].tolist()
        for kept in range(7):  # the first `kept` tokens as decoded, then the true ones
            answer = own[:kept] + trial.ids[-6:][kept:]
            forced.append(type(trial)(ids=prompt + answer, answer=6, depth=trial.depth, key="", prompt=""))
            greedy.append(own)
    # Read one after the other, each from where it differs from the one before.
    answers = list(greedy_answers(model, forced, [True] * len(forced)))
    assert [index for index, _ in answers] == list(range(len(forced)))
    for index, answer in answers:
        true = forced[index].ids[-6:]
        right = next((i for i in range(6) if true[i] != greedy[index][i]), 6)
        assert answer == greedy[index][: right + 1]
    verdicts = [answer == forced[index].ids[-6:] for index, answer in answers]
    assert True in verdicts
    assert False in verdicts


def test_leaving_trials_out_changes_nothing(llama: PreTrainedModel, encode: Encode) -> None:
    trials = make_trials(encode, 600, 8, seed=0)

    def answers(wanted: list[bool]) -> Iterator[tuple[int, list[int]]]:
        return greedy_answers(llama, trials, wanted)

    everything = dict(answers([True] * 8))
    odd = dict(answers([number % 2 == 1 for number in range(8)]))
    assert odd == {number: everything[number] for number in (1, 3, 5, 7)}


def test_figures_by_depth_add_up() -> None:
    examples: list[Example] = [{"depth": (i + 0.5) / 20, "score": int(i >= 10)} for i in range(20)]
    pooled, *by_depth = passkey_results(examples, depth_bins=5)
    assert pooled["value"] == 0.5
    assert pooled["depth"] is None
    assert [(row["depth"], row["value"], row["num_samples"]) for row in by_depth] == [
        (pytest.approx(0.1), 0.0, 4),
        (pytest.approx(0.3), 0.0, 4),
        (pytest.approx(0.5), 0.5, 4),
        (pytest.approx(0.7), 1.0, 4),
        (pytest.approx(0.9), 1.0, 4),
    ]
