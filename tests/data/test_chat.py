"""Conversations: a loss on what the assistant says and on nothing else, whatever the template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skipwise import Lengths, PoSE, UserError, WindowCollator, sentences_of
from skipwise.cli import main as cli
from skipwise.data import build
from skipwise.data.chat import begin_of_text, conversation, scored_tokens
from skipwise.data.config import DataConfig, SourceConfig
from skipwise.data.sources import MessagesError, check_source
from skipwise.data.store import Documents, open_store
from skipwise.data.windows import cut_spans, with_answers
from skipwise.positions import LongRecipe
from tests.picomodels import byte_tokenizer

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
    return np.array(encoding.ids), np.array(scored_tokens(encoding.offsets, written.answers))


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


# The structures of published templates, and the special tokens they write.
FORMS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "chatml, marked": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
        "[INST]{% if loop.index0 >= turns | length - 2 and system is defined and (loop.last or loop.revindex == 2) %}"
        "{{ system }}\n\n{% endif %} {{ m.content }}[/INST]{% else %}"
        " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ["<|User|>", "<|Assistant|>"],
    ),
    "qwen3": (
        "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.index0 > last.user %}<think>\n"
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
        "{{ '\n</think>\n\n' }}{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
}
END = {"chatml": "<|im_end|>", "chatml, marked": "<|im_end|>", "llama 3": "<|eot_id|>", "gemma": "<end_of_turn>",
       "mistral": "</s>", "deepseek": "</s>", "qwen3": "<|im_end|>"}  # fmt: skip


def of_form(name: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, special = FORMS[name]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def spoken(talk: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that have a loss, one after the other."""
    tokens, marked = encoded(talk, tokenizer)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]])))
    return [tokenizer.decode(tokens[begin:stop]) for begin, stop in edges.reshape(-1, 2)]


SHORT = ["a", "s", "user", "assistant", "1", "\u00e4", "<|im", "a a", "model", "t", ">", "[", "/", "e", "."]


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_on_answers_whatever_they_are(form: str) -> None:
    """Also where they stand in the prompt, in the template's own words, or twice."""
    tokenizer, end = of_form(form), END[form]
    for answer in SHORT:
        turn = [{"role": "user", "content": f"Say {answer} or a user, a model, an assistant."}]
        talk = [*turn, {"role": "assistant", "content": answer}] * 2
        first, last = spoken(talk, tokenizer)
        thought = "<think>\n\n</think>\n\n" if form == "qwen3" else ""
        assert first == answer + end
        assert last == thought + answer + end


@pytest.mark.parametrize("form", ["chatml", "llama 3", "mistral", "deepseek", "qwen3"])
def test_system_text_has_no_loss(form: str) -> None:
    """Also where the template moves it into the last turn of the user."""
    talk = [{"role": "system", "content": "Be short. a"}, *TALK]
    said = [text.removeprefix("<think>\n\n</think>\n\n").strip() for text in spoken(talk, of_form(form))]
    assert said == [f"Paris.{END[form]}", f"It is Lima.\nThat is all.{END[form]}"]


@pytest.mark.parametrize("form", ["qwen3", "deepseek"])
def test_thoughts_that_a_template_leaves_out_do_not_matter(form: str) -> None:
    """Those of the last turn are written, and the model learns them."""
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>\nIt is Paris.\n</think>\n\nParis."
    talk[3]["content"] = "<think>\nLima?\n</think>\n\nLima."
    first, last = spoken(talk, of_form(form))
    assert first.strip() == f"Paris.{END[form]}"
    assert last.strip() == ("<think>\nLima?\n</think>\n\n" if form == "qwen3" else "") + f"Lima.{END[form]}"


def test_a_template_may_change_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    assert spoken(TALK, tokenizer) == ["PARIS.", "IT IS LIMA.\nTHAT IS ALL."]


DROPS, CHANGES = "chat_template_drops_answer", "chat_template_changes_answer"


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", DROPS, "message 2"),
        ("{{ messages[-1].content }}", DROPS, "message 2"),
        ("{{ messages[1].content }}{{ messages[3].content }}{{ messages[3].content }}", DROPS, "2 times"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", CHANGES, "message 2"),
        ("{{ raise_exception('no such role') }}", "chat_template_failed", "no such role"),
        ("{{ messages[0].content.missing() }}", "chat_template_failed", "missing"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", DROPS, "no answer"),
    ],
)  # fmt: skip
def test_conversations_are_refused_for_the_right_reason(
    template: str, code: str, words: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(MessagesError, match=words) as caught:
        conversation(TALK, tokenizer)
    assert caught.value.code == code


def test_a_system_role_that_a_template_refuses_is_the_reason() -> None:
    with pytest.raises(MessagesError, match="no system role"):
        conversation([{"role": "system", "content": "x"}, *TALK], of_form("gemma"))


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        conversation(TALK, tokenizer)
    assert caught.value.code == "no_chat_template"


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
    collator = WindowCollator(LongRecipe(start="sentence"), lengths, sentences=sentences_of(tokenizer))
    whole = feature(tokenizer)
    one = {**whole, "input_ids": whole["input_ids"][:200], "answers": whole["answers"][:200]}
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
