"""Rows, failures and resuming, over all evaluations that need no other file."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity, TruncatedPerplexity
from skipwise.evaluation.results import EvalResult
from skipwise.evaluation.ruler import Ruler
from skipwise.evaluation.runner import evaluate
from skipwise.evaluation.specs import EVALUATIONS, EvaluationSpec
from skipwise.evaluation.statistics import Example
from skipwise.runs.directory import ExampleLog, RunDir

SPECS: tuple[EvaluationSpec, ...] = (
    Perplexity(context_lengths=(16, 64), stride=8, documents=2),
    TruncatedPerplexity(context_lengths=(16, 64)),
    Passkey(context_lengths=(400,), trials=4),
    Ruler(context_lengths=(700,), tasks=("niah_single_1", "niah_multikey_2", "vt"), samples=2),
)


@pytest.fixture
def context(make_context: Callable[..., EvaluationContext]) -> EvaluationContext:
    rng = np.random.default_rng(0)
    return make_context([rng.integers(2, 258, size=n) for n in (90, 70, 200)])


def rows_of(
    tested: ModelUnderTest, context: EvaluationContext, log: Any, specs: tuple[EvaluationSpec, ...] = SPECS
) -> list[EvalResult]:
    return [row for rows in evaluate(tested, specs, context, log, set()) for row in rows]


class Killed(BaseException):
    """As if the process had ended."""


class KilledAfter(ExampleLog):
    """A log that lets so many examples through."""

    left = 0

    def add(self, evaluation: str, example: Any) -> None:
        if KilledAfter.left == 0:
            raise Killed
        KilledAfter.left -= 1
        super().add(evaluation, example)


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_the_traits_of_an_evaluation_name_its_settings(kind: type[EvaluationSpec]) -> None:
    traits, settings = kind.traits, {field.name for field in fields(kind)}
    named = {traits.counted, traits.results_by, traits.source, traits.other_model, *traits.without_effect} - {None}
    assert named <= settings
    assert traits.on_documents == hasattr(kind, "with_documents") == ("document_ids" in settings)


def test_killed_and_resumed_is_as_in_one_go(tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path) -> None:
    """Wherever the end comes; the files too are the same."""
    whole = ExampleLog(tmp_path / "whole")
    expected = rows_of(tested, context, whole)
    assert {row.status for row in expected} == {"ok", "beyond_window"}
    examples = sum(len(whole.read(spec.name)) for spec in SPECS)
    for kill_after in range(0, examples, 3):
        log = KilledAfter(tmp_path / str(kill_after))
        KilledAfter.left = kill_after
        with pytest.raises(Killed):
            rows_of(tested, context, log)
        KilledAfter.left = examples
        assert rows_of(tested, context, log) == expected
        for spec in SPECS:
            assert log.read(spec.name) == whole.read(spec.name)


def test_what_has_its_rows_is_not_measured_again(
    tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path
) -> None:
    log = ExampleLog(tmp_path / "log")
    done: set[tuple[str, int | None]] = {
        ("perplexity", 16), ("truncated_perplexity", 16), ("truncated_perplexity", 64), ("passkey", 400)
    }  # fmt: skip
    rows = [row for rows in evaluate(tested, SPECS[:3], context, log, done) for row in rows]
    assert {(row.evaluation, row.context_length) for row in rows} == {("perplexity", 64)}


def test_beyond_the_window_is_said(tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path) -> None:
    rows = rows_of(replace(tested, window=32), context, ExampleLog(tmp_path / "log"), SPECS[:1])
    assert {(row.context_length, row.status) for row in rows} == {(16, "ok"), (64, "beyond_window")}
    assert all(row.value is not None for row in rows)
    assert rows[-1].reason == "longer than the model's window of 32 tokens"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    ],
)
def test_out_of_memory_at_one_length(
    tested: ModelUnderTest,
    context: EvaluationContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """That row failed, the others are there; the next run tries again."""
    original = Perplexity.measurements

    def failing(self: Perplexity, tested: ModelUnderTest, context: EvaluationContext) -> Iterator[Any]:
        for measurement in original(self, tested, context):
            if measurement.context_lengths == (16,):

                def measure(done: Any, lengths: Any) -> Iterator[Example]:
                    raise error
                    yield

                measurement = replace(measurement, measure=measure)
            yield measurement

    monkeypatch.setattr(Perplexity, "measurements", failing)
    run = RunDir(tmp_path)
    run.add_results(rows_of(tested, context, run.examples("m"), SPECS[:1]))
    rows = run.read_results()
    assert [(row.context_length, row.status, row.reason) for row in rows[:1]] == [(16, "failed", "out of memory")]
    assert {row.context_length for row in rows if row.status != "failed"} == {64}
    assert run.measured("original", "pico") == {("perplexity", 64)}

    monkeypatch.setattr(Perplexity, "measurements", original)  # the next run tries again
    done = run.measured("original", "pico")
    for new in evaluate(tested, SPECS[:1], context, run.examples("m"), done):
        run.add_results(new)
    assert run.measured("original", "pico") == {("perplexity", 16), ("perplexity", 64)}
    assert {row.status for row in run.read_results()} <= {"ok", "beyond_window"}


def test_of_several_lengths_in_one_pass_only_the_longest_fails(
    tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipwise.evaluation import perplexity

    original = perplexity.truncated_sums

    def sums(model: Any, ids: np.ndarray) -> np.ndarray:
        if len(ids) > 32:
            raise MemoryError
        return original(model, ids)

    monkeypatch.setattr(perplexity, "truncated_sums", sums)
    spec = TruncatedPerplexity(context_lengths=(16, 32, 48, 64))
    rows = rows_of(tested, context, ExampleLog(tmp_path / "log"), (spec,))
    assert {(row.context_length, row.status) for row in rows} == {
        (16, "ok"), (32, "ok"), (48, "failed"), (64, "failed")
    }  # fmt: skip


def test_our_own_mistakes_are_no_rows(
    tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        yield

    monkeypatch.setattr(Perplexity, "measurements", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        rows_of(tested, context, ExampleLog(tmp_path / "log"), SPECS[:1])


def test_learned_positions_end(tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    spec = Perplexity(context_lengths=(32, 70), stride=16)
    rows = rows_of(replace(tested, model=model, window=64), context, ExampleLog(tmp_path / "log"), (spec,))
    assert {(row.context_length, row.status) for row in rows} == {(32, "ok"), (70, "failed")}
    assert "64 positions, and none beyond" in str(rows[-1].reason)


def test_chat_prompts(tested: ModelUnderTest, context: EvaluationContext, tmp_path: Path) -> None:
    """The prompt is the user's turn, and the answer begins the assistant's."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
    chatting = replace(tested, chat=True)
    rows = rows_of(chatting, context, ExampleLog(tmp_path / "none"), SPECS[2:3])
    assert rows[0].status == "failed"
    assert "chat template" in str(rows[0].reason)

    chatting.tokenizer.chat_template = template
    from skipwise.evaluation.passkey import make_trials
    from skipwise.evaluation.prompts import encoder

    (trial,) = make_trials(encoder(chatting.tokenizer, chat=True), 500, 1, seed=0)
    text = chatting.tokenizer.decode(trial.ids)
    assert text.startswith("<user>There is an important info")
    assert text.endswith(f"What is the pass key?</user><assistant>The pass key is {trial.key}")
    rows = rows_of(chatting, context, ExampleLog(tmp_path / "chat"), SPECS[2:3])
    assert rows[0].status == "beyond_window"


def test_a_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    log = ExampleLog(tmp_path)
    log.add("passkey", {"example": "0"})
    with (tmp_path / "passkey.jsonl").open("a") as file:
        file.write('{"example": "1", "sco')
    assert log.read("passkey") == [{"example": "0"}]
    log.add("passkey", {"example": "1"})
    log.add("passkey", {"example": "2"})
    lines = (tmp_path / "passkey.jsonl").read_text().splitlines()
    assert [json.loads(line)["example"] for line in lines] == ["0", "1", "2"]
