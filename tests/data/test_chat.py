"""Conversations: a loss on what the assistant says and on nothing else, whatever the template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import Lengths, PoSE, UserError, WindowCollator, cli
from skipwise.config import DataConfig, SourceConfig
from skipwise.data.chat import Turns, as_text, turns_of
from skipwise.data.store import open_store
from skipwise.positions import LongRecipe

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


def encoded(talk: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return np.array(tokenizer(as_text(talk, tokenizer), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_nothing_else_are_marked(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, name)
    tokens = encoded(TALK, tokenizer)
    turns = turns_of(tokenizer)
    marked = turns.answers(tokens)
    said = tokenizer.decode(tokens[marked])
    end = tokenizer.decode([turns.end])
    assert [part.strip() for part in said.split(end)] == ["Paris.", "It is Lima.\nThat is all.", ""]
    assert not as_text(TALK, tokenizer).startswith("<s>")  # it is put in front of every window later


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_begin_behind_answers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, name)
    tokens, turns = encoded(TALK, tokenizer), turns_of(tokenizer)
    (boundary,) = (b for b in turns.boundaries(tokens) if b < len(tokens) - 2)
    assert "And of Peru?" in tokenizer.decode(tokens[boundary:])
    assert "Paris." in tokenizer.decode(tokens[:boundary])


def test_what_is_cut_off() -> None:
    """An answer without its beginning is none; one without its end goes on to the end."""
    turns = Turns(before=(1, 2), end=9)
    assert turns.answers(np.array([5, 9, 1, 2, 7, 8])).tolist() == [False, False, False, False, True, True]
    assert not turns.answers(np.array([7])).any()


def test_templates_that_hide_answers_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for template, message in (
        (None, "has none"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing in front of an answer"),
        ("{% for m in messages %}{{ m.content | upper }}.{% endfor %}", "changes what is said"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            turns_of(tokenizer)


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
    source = SourceConfig(source=str(file), messages_field="messages")
    store = open_store(source, DataConfig(sources=(source,), max_malformed_share=0.02), tokenizer)
    report = store.summary["report"]
    assert (report["records"], report["malformed"]) == (202, 2)
    assert "the chat template does not take it (only user and assistant)" in report["examples"][1]
    first = store.train.read(int(store.train.starts[0]), int(store.train.stops[0]))
    assert tokenizer.decode(first).startswith("[INST] Question")


def features(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = encoded(TALK * 3, tokenizer)
    return {"input_ids": tokens, "chat": True, "visit": (0, 0, 0)}


def test_windows_have_a_loss_on_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, "chatml")
    lengths = Lengths(original=128, train=128, target=1024)
    collator = WindowCollator(PoSE(), lengths, turns=turns_of(tokenizer))
    batch = collator([features(tokenizer)])
    labelled = batch["labels"][0] != -100
    assert 0 < int(labelled.sum()) < 128
    assert "Paris." in tokenizer.decode(batch["labels"][0][labelled])
    assert "capital" not in tokenizer.decode(batch["labels"][0][labelled])
    text = {**features(tokenizer), "chat": False}
    assert (collator([text])["labels"] != -100).all()  # and text beside it everywhere


def test_longrecipe_skips_between_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tokenizer, "chatml")
    turns, lengths = turns_of(tokenizer), Lengths(original=200, train=200, target=4096)
    from skipwise import sentences_of

    collator = WindowCollator(LongRecipe(), lengths, sentences=sentences_of(tokenizer), turns=turns)
    feature = features(tokenizer)
    positions = collator([feature])["position_ids"][0].numpy()
    jumps = np.flatnonzero(np.diff(positions) > 1) + 1
    assert len(jumps) and set(jumps) <= set(turns.boundaries(feature["input_ids"]).tolist())


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
    assert "chat template, but it has none" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
