"""How long a run takes: arithmetic on measured seconds."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from skipwise.evaluation.cost import tokens_read
from skipwise.evaluation.harness import Harness
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity, TruncatedPerplexity
from skipwise.workflows.duration import (
    TimeLeft,
    evaluation_seconds,
    measure_evaluation,
    measure_training,
    reading_seconds,
)
from tests.commands import skipwise


def test_evaluations_take_as_long_as_the_first_and_training_as_expected() -> None:
    left = TimeLeft({"evaluate original": 10.0, "train": 60.0, "evaluate extended": 10.0})
    assert left.seconds() == 80.0
    left.finish("evaluate original", 15.0)
    assert left.seconds() == 75.0
    left.finish("train", 90.0)
    assert left.seconds() == 15.0
    left.finish("evaluate extended", 15.0)
    assert left.seconds() is None
    assert TimeLeft({}).seconds() is None


def test_reading_beyond_what_was_measured_grows_with_attention() -> None:
    """A text of n tokens takes 0.001 n + 0.0001 n^2 seconds."""
    measured = {n: 1e-3 * n + 1e-4 * n * n for n in (50, 100)}
    assert reading_seconds(400, measured) == pytest.approx(1e-3 * 400 + 1e-4 * 400**2)
    assert reading_seconds(75, measured) == pytest.approx((measured[50] + measured[100]) / 2)
    assert reading_seconds(20, measured) == measured[50]  # a text takes some time however short it is
    # Noise that makes the longer text the faster one is no reason for less than nothing at long ones.
    assert reading_seconds(400, {50: 1.0, 100: 1.0}) == pytest.approx(4.0)
    assert reading_seconds(400, {100: 1.0}) == pytest.approx(4.0)


def test_an_evaluation_takes_what_its_texts_take() -> None:
    measured = {100: 1.0, 400: 6.0}
    perplexity = Perplexity(context_lengths=(400,), stride=400, documents=3, max_document_tokens=400)
    assert evaluation_seconds([perplexity], measured) == pytest.approx(3 * 6)
    # Of passkey prompts with one key each reads on from where it differs from the one before: half of it in the mean.
    passkey = Passkey(context_lengths=(100, 400), trials=10)
    assert evaluation_seconds([passkey], measured) == pytest.approx(5 * (1 + 6))
    many = Passkey(context_lengths=(400,), trials=10, keys_per_prompt=5)
    assert evaluation_seconds([perplexity, many], measured) == pytest.approx(3 * 6 + 2 * 6)


def test_what_is_expected_is_what_is_read() -> None:
    """With a second a token, that is: of sliding windows over the end of the longest text, and of one pass for all."""
    lengths = (256, 1024, 4096)
    measured = {n: float(n) for n in lengths}
    sliding = Perplexity(context_lengths=lengths, stride=64, documents=8, final_tokens=512)
    truncated = TruncatedPerplexity(context_lengths=lengths, documents=8)
    for spec, tokens in ((sliding, 8 * (8 * 256 + 8 * 1024 + 4096)), (truncated, 8 * 4096)):
        assert evaluation_seconds([spec], measured) == tokens == tokens_read(spec)


def test_an_estimate_never_ends_a_run(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("this attention takes no such mask")

    monkeypatch.setattr(type(llama), "forward", fail)
    passkey = Passkey(context_lengths=(64,), trials=2)
    assert measure_evaluation(llama, [passkey], torch.float32) is None
    settings = {"window": 32, "windows": 4, "dtype": torch.float32, "kl_weight": 0.0, "skips": False, "echoes": False}
    assert measure_training(llama, **settings) is None


def test_what_is_not_known_is_not_guessed(llama: PreTrainedModel) -> None:
    harness = Harness(tasks=("piqa",))
    passkey = Passkey(context_lengths=(64,), trials=2)
    assert measure_evaluation(llama, [harness, passkey], torch.float32) is None
    assert measure_evaluation(llama, [], torch.float32) == 0.0
    assert (measure_evaluation(llama, [passkey], torch.float32) or 0.0) > 0.0


def test_a_trial_step_leaves_the_model_as_it_is(llama: PreTrainedModel) -> None:
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    one = measure_training(llama, window=32, windows=4, dtype=torch.float32, kl_weight=1.0, skips=True, echoes=True)
    assert one is not None and one > 0
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert all(weight.grad is None for weight in llama.parameters())


def test_a_run_says_how_much_time_is_left_and_a_resumed_one_does_not(config_file: Path, tmp_path: Path) -> None:
    flags = ["extend", config_file, "--output", tmp_path / "run", "--set", "evaluate=[]", "--steps", 1]
    said = skipwise(*flags)
    assert "This run takes" in said and "step 1 of 1: train (whole run: " in said
    assert "This run takes" not in skipwise(*flags, "--resume")
