"""Question answering and summaries, on records in the shape of LongBench."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipwise import UserError
from skipwise.evaluation import applications
from skipwise.evaluation.applications import (
    QuestionAnswering,
    Summarization,
    _records,
    _text_of,
    fitted_context,
    references_of,
    rouge,
    token_f1,
)
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.evaluation.prompts import encoder

MakeContext = Callable[..., EvaluationContext]


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("Maria Lopez", "maria lopez", 1.0),
        ("It was the Maria Lopez!", "Maria Lopez", 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # precision 2/4, recall 1
        ("a cat a cat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # nothing is left of either, as in SQuAD
    ],
)
def test_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(f1)


def test_rouge_by_hand() -> None:
    """Words the, cat, sat / the, cat, lay, down: two in common, one pair, longest common subsequence two."""
    scores = rouge("the cat sat", "the cat lay down")
    assert scores["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == scores["rouge1"]


def test_a_long_context_loses_its_middle(tested: ModelUnderTest) -> None:
    encode = encoder(tested.tokenizer, chat=False)
    context = "begin " + "middle " * 100 + "end"
    prompt = fitted_context(encode, "[{context}]", "!", context, room=100)
    assert len(encode(prompt, "!")) in (99, 100)
    assert prompt.startswith("[begin ")
    assert prompt.endswith(" end]")
    assert applications.GAP in prompt
    assert fitted_context(encode, "[{context}]", "!", context, room=2000) == f"[{context}]"
    with pytest.raises(UserError, match="needs 11 tokens without any context, but beside"):
        fitted_context(encode, "[[[[{context}", "", context, room=5)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    records = [
        {"context": "The {tower} is by Lopez.", "input": "Who built {it}?", "answers": ["Lopez", "Maria Lopez"]},
        {"context": "The bridge is long.", "input": "What is long?", "answers": ["the bridge"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_questions(tested: ModelUnderTest, make_context: MakeContext, questions: str, monkeypatch: Any) -> None:
    """The first line counts, against the best reference."""
    written = iter([b" Maria Lopez\nQuestion: more", b" a tunnel"])

    def write(model: object, ids: list[int], most: int, is_over: Callable[[list[int]], bool]) -> list[int]:
        assert "Question: W" in tested.tokenizer.decode(ids)
        text = next(written)
        assert is_over(tested.tokenizer(text.decode())["input_ids"]) == (b"\n" in text)
        return list(tested.tokenizer(text.decode())["input_ids"])

    monkeypatch.setattr("skipwise.evaluation.inference.continue_greedily", write)
    spec = QuestionAnswering(source=questions, context_lengths=(400,))
    (measurement,) = spec.measurements(tested, make_context())
    examples = list(measurement.measure(set(), measurement.context_lengths))
    assert [example["prediction"] for example in examples] == ["Maria Lopez", "a tunnel"]
    (result,) = measurement.results(examples)
    assert (result["metric"], result["value"]) == ("f1", pytest.approx(0.5))
    assert not list(measurement.measure({(400, "0"), (400, "1")}, measurement.context_lengths))


def test_summaries(tested: ModelUnderTest, make_context: MakeContext, questions: str) -> None:
    spec = Summarization(source=questions, context_lengths=(400,), max_new_tokens=8)
    (measurement,) = spec.measurements(tested, make_context())
    examples = list(measurement.measure(set(), measurement.context_lengths))
    assert len(examples) == 2
    assert [result["metric"] for result in measurement.results(examples)] == ["rouge1", "rouge2", "rougeL"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n", "no records"),
        ('{"context": "a", "input": "b", "answers": ["c"]}\n{"conte\n', "1 of 2 are"),
        ('{"context": "a"}\n', "lacks input, answers"),
        ("[1]\n", "lacks context"),
    ],
)
def test_wrong_records(
    tested: ModelUnderTest, make_context: MakeContext, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    (measurement,) = QuestionAnswering(source=str(path), context_lengths=(400,)).measurements(tested, make_context())
    with pytest.raises(UserError, match=message):
        list(measurement.measure(set(), measurement.context_lengths))


@pytest.mark.parametrize(
    ("value", "references"),
    [
        ("Paris", ["Paris"]),  # HotpotQA
        (["Paris", "paris"], ["Paris", "paris"]),  # LongBench, NQ-open
        ({"text": ["Paris", "Paris"], "answer_start": [1, 9]}, ["Paris"]),  # SQuAD
        ({"text": "Paris"}, ["Paris"]),
        ([{"text": "Paris", "tokens": ["Paris"]}, {"text": "it is Paris"}], ["Paris", "it is Paris"]),  # NarrativeQA
        ({"value": "Paris", "aliases": ["Paris, France"], "type": "x"}, ["Paris", "Paris, France"]),  # TriviaQA
        ({"spans": ["4"], "types": ["number"]}, ["4"]),  # DROP
        (0, ["0"]),
        ([1987, "87"], ["1987", "87"]),
        ({"text": [], "answer_start": []}, []),  # SQuAD 2: no answer
        ([" "], []),
        (None, None),
        (True, None),
        ([["Paris"]], None),
        ({"answer": "Paris"}, None),
        ([{"unanswerable": False, "free_form_answer": "x"}], None),  # Qasper
        ({"text": {"a": 1}}, None),
    ],
)
def test_references_of_published_sets(value: object, references: list[str] | None) -> None:
    assert references_of(value) == references


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (["a", "b"], "a\n\nb"),
        ({"text": "a", "tokens": ["a"]}, "a"),
        ({"title": ["T", "U"], "sentences": [["One. ", "Two."], ["Three."]]}, "T\nOne. Two.\n\nU\nThree."),
        ({"html": "<p>"}, None),
        ([["a"]], None),
        (5, None),
    ],
)
def test_texts_of_published_sets(value: object, text: str | None) -> None:
    if text is not None:
        assert _text_of(value, "context", "here") == text
        return
    with pytest.raises(UserError, match="here") as caught:
        _text_of(value, "context", "here")
    assert caught.value.code == "record_shape_unknown"


@pytest.mark.parametrize("answers", [{"start": 3}, {"text": [], "answer_start": []}, [["a"]]])
def test_another_shape_is_refused_with_the_record(tmp_path: Path, answers: object) -> None:
    file = tmp_path / "questions.jsonl"
    good = {"context": "a", "input": "b", "answers": {"text": ["c"], "answer_start": [0]}}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "answers": answers}) + "\n")
    spec = QuestionAnswering(source=str(file), context_lengths=(64,))
    read = _records(spec, (spec.context_field, spec.question_field))
    assert next(read) == (0, ["a", "b"], ["c"])
    with pytest.raises(UserError) as caught:
        next(read)
    assert caught.value.code == "record_shape_unknown"
    assert f"{file}:2" in str(caught.value)
