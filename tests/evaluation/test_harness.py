"""The adapter to lm-evaluation-harness, on a task defined here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import UserError
from skipwise.evaluation.harness import (
    SHORT_TASKS,
    Harness,
    harness_model,
    parse_task,
    task_manager,
)
from skipwise.evaluation.measurement import EvaluationContext, ModelUnderTest
from skipwise.evaluation.runner import evaluate
from skipwise.runs.directory import ExampleLog

QUESTIONS = [("The sky is", "blue", "loud"), ("Grass is", "green", "seven"), ("Snow is", "white", "angry")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a task; the index of all tasks is made once for it."""
    place = tmp_path_factory.mktemp("harness")
    records = [{"question": q, "choices": [right, wrong], "label": 0} for q, right, wrong in QUESTIONS]
    data = place / "colours.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "tasks").mkdir()
    (place / "tasks/colours.yaml").write_text(
        f"""
task: skipwise_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return str(place / "tasks")


@torch.no_grad()
def right(tested: ModelUnderTest, question: str, choices: tuple[str, str]) -> bool:
    """Whether the right choice has the higher likelihood, token by token."""

    def log_likelihood(choice: str) -> float:
        context = tested.tokenizer(question)["input_ids"]
        ids = tested.tokenizer(f"{question} {choice}")["input_ids"]
        log_probs = tested.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(sum(log_probs[i - 1, ids[i]] for i in range(len(context), len(ids))))

    return log_likelihood(choices[0]) > log_likelihood(choices[1])


def test_a_task_of_ones_own(
    tested: ModelUnderTest, make_context: Callable[..., EvaluationContext], tasks: str, tmp_path: Path
) -> None:
    expected = [right(tested, question, choices) for question, *choices in QUESTIONS]  # type: ignore[arg-type]
    spec = Harness(tasks=("skipwise_colours", "skipwise_colours:1"), include_path=tasks)
    log = ExampleLog(tmp_path / "log")
    rows = [row for rows in evaluate(tested, (spec,), make_context(), log, set()) for row in rows]
    assert [(row.evaluation, row.metric, row.context_length, row.num_samples, row.status) for row in rows] == [
        ("harness/skipwise_colours", "acc", None, 3, "ok"),
        ("harness/skipwise_colours:1", "acc", None, 3, "ok"),
    ]
    assert rows[0].value == pytest.approx(sum(expected) / 3)
    scores = {line["example"]: line["score"] for line in log.read("harness") if "score" in line}
    assert [scores[f"skipwise_colours/skipwise_colours:{i}"] for i in range(3)] == [float(hit) for hit in expected]

    # Cut off in the middle of a task: the same lines, none of them twice.
    lines = (tmp_path / "log/harness.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/harness.jsonl").write_text("".join(lines[:2]))
    cut = ExampleLog(tmp_path / "cut")
    again = [row for rows in evaluate(tested, (spec,), make_context(), cut, set()) for row in rows]
    assert again == rows
    assert cut.read("harness") == log.read("harness")
    done = {("harness/skipwise_colours", None)}
    (other,) = evaluate(tested, (spec,), make_context(), ExampleLog(tmp_path / "other"), done)  # type: ignore[arg-type]
    assert other == rows[1:]


def test_data_out_of_reach_fails_alone(
    tested: ModelUnderTest, make_context: Callable[..., EvaluationContext], tasks: str, tmp_path: Path
) -> None:
    """Hubs are off limits in the tests, as they are without a network."""
    spec = Harness(tasks=("piqa", "skipwise_colours"), include_path=tasks)
    failed, fine = evaluate(tested, (spec,), make_context(), ExampleLog(tmp_path / "log"), set())
    assert [(row.evaluation, row.status) for row in failed] == [("harness/piqa", "failed")]
    assert "harness task piqa cannot be run" in str(failed[0].reason)
    assert [row.status for row in fine] == ["ok"]


def test_unknown_tasks(tested: ModelUnderTest, make_context: Callable[..., EvaluationContext], tasks: str) -> None:
    spec = Harness(tasks=("skipwise_colors",), include_path=tasks)
    (measurement,) = spec.measurements(tested, make_context())
    with pytest.raises(UserError, match="Did you mean 'skipwise_colours'"):
        next(measurement.measure(set(), measurement.context_lengths))


def test_the_default_is_the_suite_of_the_paper(tasks: str) -> None:
    """Table 3: zero-shot BoolQ, PIQA, WinoGrande, TruthfulQA; 25-shot ARC-Challenge, 10-shot HellaSwag."""
    parsed = dict(map(parse_task, SHORT_TASKS))
    assert parsed.pop("arc_challenge") == 25
    assert parsed.pop("hellaswag") == 10
    assert parsed == dict.fromkeys(["boolq", "piqa", "winogrande", "truthfulqa_mc2"], 0)
    assert {parse_task(text)[0] for text in SHORT_TASKS} <= set(task_manager(tasks).all_tasks)
    for wrong in ("boolq:many", ":5"):
        with pytest.raises(UserError, match="name:number"):
            Harness(tasks=(wrong,))


@torch.no_grad()
def test_a_rolling_likelihood_begins_with_one_token(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenizers that begin texts with a token themselves had two there, and the second was scored."""
    tokenizer.bos_token = "<s>"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    text = "a text of some words"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == begin and ids[1] != begin
    model = harness_model()(pretrained=llama, tokenizer=tokenizer, batch_size=1)
    (found,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    chances = llama.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = chances[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)
    assert model.tok_encode(text)[0] == begin  # elsewhere the tokenizer's own way
