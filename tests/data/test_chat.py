"""Conversations: a loss on what the assistant says and on nothing else, whatever the template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import Lengths, PoSE, UserError, WindowCollator, cli, sentences_of
from skipwise.config import DataConfig, SourceConfig
from skipwise.data import build
from skipwise.data.chat import begin_of_text, conversation, scored_tokens
from skipwise.data.sources import MessagesError, check_source
from skipwise.data.store import Documents, open_store
from skipwise.data.windows import cut_spans, with_answers
from skipwise.positions import LongRecipe
from tests.conftest import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST}
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Peru? Say <Lima> if you know."},
    {"role": "assistant", "content": "It is Lima.\nThat is all."},
]


def with_template(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATES[name]
    if name == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def encoded(talk: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation, and which of them the assistant says."""
    written = conversation(talk, tokenizer)
    encoding = tokenizer.backend_tokenizer.encode(written.text, add_special_tokens=False)
    special = frozenset(tokenizer.added_tokens_decoder)
    return np.array(encoding.ids), np.array(scored_tokens(encoding.offsets, encoding.ids, written.answers, special))


ANSWERS = [
    "It is Lima.\nThat is all.",
    "\n\nIt begins with lines.",
    "    code = indented",
    "And of Peru?",  # what the user says, too
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_nothing_else_are_marked(name: str, answer: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, name)
    tokens, marked = encoded([*TALK[:3], {"role": "assistant", "content": answer}], tokenizer)
    end = "<|im_end|>" if name == "chatml" else "</s>"
    said = tokenizer.decode(tokens[marked]).split(end)
    assert [part.strip() for part in said] == ["Paris.", answer.strip(), ""]


def test_the_first_token_of_a_text_is_there_once() -> None:
    """Left out where the tokenizer puts it in front of every window; kept where it does not, as in SmolLM2's ChatML."""
    plain = byte_tokenizer()
    plain.chat_template = INST
    assert begin_of_text(plain) == []
    assert conversation(TALK, plain).text.startswith("<s>[INST]")
    with_begin = byte_tokenizer()
    with_begin.chat_template = INST
    with_begin.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_begin.bos_token_id)]
    )
    assert begin_of_text(with_begin) == [with_begin.bos_token_id]
    assert conversation(TALK, with_begin).text.startswith("[INST]")


def test_the_day_is_not_in_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert "01 Jan 2025" in conversation(TALK, tokenizer).text


def test_templates_that_change_answers_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}.{% endfor %}"
    with pytest.raises(MessagesError, match="writes something else"):
        conversation(TALK, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has none"):
        conversation(TALK, tokenizer)


def talks(path: Path, count: int = 40) -> Path:
    """Conversations, a fifth of them in the form of some other data set."""
    lines = []
    for number in range(count):
        question = {"role": "user", "content": f"Question {number}: " + "why? " * 20}
        answer = {"role": "assistant", "content": f"Answer {number}: " + "so. " * 20}
        lines.append({"messages": [question, answer] * 2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_store_of_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, "inst")
    file = talks(tmp_path / "talks.jsonl", 200)
    with file.open("a") as lines:
        lines.write(json.dumps({"messages": [{"role": "user", "content": "and?"}]}) + "\n")
        lines.write(json.dumps({"messages": [{"role": "system", "content": "x"}, TALK[1]]}) + "\n")
        lines.write(
            '{"messages": [{"role": "user", "content": "x \\ud83d y"}, {"role": "assistant", "content": "z"}]}\n'
        )
    source = SourceConfig(source=str(file), messages_field="messages")
    store = open_store(source, DataConfig(sources=(source,), max_malformed_share=0.02), tokenizer)
    report = store.summary["report"]
    assert (report["records"], report["malformed"]) == (203, 3)
    assert "the chat template does not take it (only user and assistant)" in report["examples"][1]
    first = store.train.read(int(store.train.starts[0]), int(store.train.stops[0]))
    assert tokenizer.decode(first).startswith("<s>[INST] Question")


def feature(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens, marked = encoded(TALK * 3, tokenizer)
    return {"input_ids": tokens, "answers": marked, "visit": (0, 0, 0)}


@pytest.mark.parametrize("content", ["contiguous", "uniform"])
def test_windows_have_a_loss_on_answers(content: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, "chatml")
    one = feature(tokenizer)
    batch = WindowCollator(PoSE(content=content), Lengths(original=128, train=128, target=1024))([one])
    labelled = batch["labels"][0] != -100
    assert 0 < int(labelled.sum()) < 128
    assert set(batch["labels"][0][labelled].tolist()) <= set(one["input_ids"][one["answers"]].tolist())
    text = {key: value for key, value in one.items() if key != "answers"}
    assert (WindowCollator(PoSE(), Lengths(128, 128, 1024))([text])["labels"] != -100).all()


def test_longrecipe_skips_between_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, "chatml")
    lengths = Lengths(original=200, train=200, target=4096)
    collator = WindowCollator(LongRecipe(), lengths, sentences=sentences_of(tokenizer))
    one = {name: values[:200] for name, values in feature(tokenizer).items() if name != "visit"}
    positions = collator([one])["position_ids"][0].numpy()
    jumps = np.flatnonzero(np.diff(positions) > 1) + 1
    assert len(jumps)
    for jump in jumps:
        assert one["answers"][jump - 1] and not one["answers"][jump]


def test_pieces_without_an_answer_are_left_out() -> None:
    scored = np.zeros(40, bool)
    scored[25:30] = True
    documents = Documents(np.arange(40), np.array([0]), np.array([40]), scored)
    spans = cut_spans(documents, 10, 10, join=False)
    assert with_answers(documents, spans).tolist() == [[20, 30]]
    assert with_answers(Documents(np.arange(40), np.array([0]), np.array([40])), spans).tolist() == spans.tolist()


def test_a_long_answer_is_one_in_every_piece(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where its beginning is in another piece."""
    tokenizer = with_template(tokenizer, "inst")
    talk = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "and then " * 100}]
    file = tmp_path / "talk.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": [*talk, {"role": "user", "content": str(n)}]}) + "\n" for n in range(9))
    )
    source = SourceConfig(source=str(file), messages_field="messages")
    store = open_store(source, DataConfig(sources=(source,)), tokenizer)
    train = store.train
    spans = cut_spans(train, 128, 128, join=False)
    assert (train.scored is not None and len(spans) == 6 * len(train)) or len(spans) > 5 * len(train)
    assert all(train.scored[begin:end].sum() > 64 for begin, end in spans)


def test_an_interrupted_store_is_taken_over(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marks with its tokens."""
    tokenizer = with_template(tokenizer, "inst")
    source = SourceConfig(source=str(talks(tmp_path / "talks.jsonl", 60)), messages_field="messages")
    data = DataConfig(sources=(source,))
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 2000)
    calls = 0

    def stop(documents: int, tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(source, data, tokenizer, stop)
    resumed = open_store(source, data, tokenizer).train
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "other"))
    whole = open_store(source, data, tokenizer).train
    assert resumed.scored is not None and whole.scored is not None
    np.testing.assert_array_equal(resumed.scored, whole.scored)
    np.testing.assert_array_equal(resumed.tokens, whole.tokens)


@pytest.mark.parametrize("name", ["notes.txt", "builtin:python"])
def test_text_has_no_messages(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text\n")
    path = name if name.startswith("builtin") else str(tmp_path / name)
    with pytest.raises(UserError, match="messages_field is for records"):
        check_source(SourceConfig(source=path, messages_field="messages"))


def test_an_instruct_model_is_extended(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Through the command; the written tokenizer keeps its template."""
    tokenizer.chat_template = INST
    llama.save_pretrained(tmp_path / "pico")
    tokenizer.save_pretrained(tmp_path / "pico")
    file = talks(tmp_path / "talks.jsonl")
    config = {
        "model": {"path": str(tmp_path / "pico")},
        "lengths": {"target": 256},
        "data": {"source": str(file), "messages_field": "messages", "short_documents": "join", "retrieval_share": 0.2},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0},
        "evaluate": [],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["extend", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run")]
    assert cli.run(lambda: cli.app(arguments, standalone_mode=False)) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in log if "loss" in line)
    assert "[INST]" in (tmp_path / "run" / "model" / "chat_template.jinja").read_text()


def test_a_model_without_a_template_is_refused(
    tmp_path: Path, pico_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = talks(tmp_path / "talks.jsonl")
    arguments = [
        "extend",
        str(pico_directory),
        "--target",
        "256",
        "--data",
        str(file),
        "--output",
        str(tmp_path / "run"),
    ]
    arguments += ["--set", "data.messages_field=messages"]
    assert cli.run(lambda: cli.app(arguments, standalone_mode=False)) == 2
    assert "chat template of a fast tokenizer, but this one has none" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
