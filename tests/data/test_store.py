"""Tokenised stores: content, split, reuse."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from skipwise import UserError
from skipwise.data import build, store
from skipwise.data.config import DataConfig, SourceConfig
from skipwise.data.sources import RawDocument, same_content
from skipwise.data.store import TokenStore, open_store
from skipwise.utils import files as hashes


def open_file(path: Path, tokenizer: PreTrainedTokenizerFast, share: float = 0.3) -> TokenStore:
    data = DataConfig(sources=(SourceConfig(source=str(path)),), held_out_share=share)
    return open_store(data.sources[0], data, tokenizer)


def test_every_token_of_every_document_is_there_once(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    opened = open_file(text_file, tokenizer)
    parts = (opened.train, opened.held_out)
    decoded = [tokenizer.decode(p.read(a, b)) for p in parts for a, b in zip(p.starts, p.stops, strict=True)]
    assert sorted(decoded) == sorted(texts)
    assert len(opened.train)
    assert len(opened.held_out)
    gaps = opened.train.tokens[opened.train.stops]
    assert (gaps == tokenizer.eos_token_id).all()
    assert opened.train.tokens.dtype == np.uint16


def test_the_split_depends_on_documents_not_on_their_order(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = open_file(text_file, tokenizer).summary["held_out"]["hashes"]
    lines = text_file.read_text().splitlines()
    shuffled = text_file.with_name("shuffled.jsonl")
    shuffled.write_text("\n".join(lines[::-1]))
    assert sorted(open_file(shuffled, tokenizer).summary["held_out"]["hashes"]) == sorted(held_out)


def test_few_documents_still_leave_one_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 100}) for letter in "abc"))
    opened = open_file(path, tokenizer, share=1e-6)
    assert (len(opened.train), len(opened.held_out)) == (2, 1)
    assert opened.summary["split_by"] == "lowest hash"
    a, b = (
        {bytes(p.read(s, e)) for s, e in zip(p.starts, p.stops, strict=True)} for p in (opened.train, opened.held_out)
    )
    assert not a & b


def test_a_single_document_is_split_near_its_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text("0123456789" * 100)
    opened = open_file(tmp_path / "book.txt", tokenizer, share=1e-6)
    assert (opened.train.lengths.tolist(), opened.held_out.lengths.tolist()) == ([800], [200])
    assert opened.train.stops[0] == opened.held_out.starts[0]


def test_a_second_run_reads_nothing(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_file(text_file, tokenizer)
    monkeypatch.setattr(build, "read_documents", lambda *_: pytest.fail("read again"))
    again = open_file(text_file, tokenizer)
    assert (again.train.tokens == first.train.tokens).all()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        open_file(text_file, tokenizer, share=0.4)


def test_changed_content_is_noticed(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before = len(open_file(text_file, tokenizer).train)
    text_file.write_text(text_file.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert len(open_file(text_file, tokenizer).train) + len(open_file(text_file, tokenizer).held_out) == 13
    assert before <= 12


def test_the_same_content_is_the_same_data(
    text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another time, in another directory, under another name; other content is not, at the same time and size."""
    first = open_file(text_file, tokenizer)
    content, stat = text_file.read_bytes(), text_file.stat()
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.write_bytes(content)
    os.utime(text_file, (1, 1))
    monkeypatch.setattr(build, "read_documents", lambda *_: pytest.fail("read again"))
    for path in (text_file, copy):
        again = open_file(path, tokenizer)
        assert again.summary["source"] == str(path)
        assert same_content(first.summary, json.loads(json.dumps(again.summary)))
    text_file.write_bytes(content.replace(b"document 1:", b"document 9:"))
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        open_file(text_file, tokenizer)


def test_data_of_a_run_that_knew_files_by_their_times(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    now = json.loads(json.dumps(open_file(text_file, tokenizer).summary))
    old = {
        **now,
        "identity": {**now["identity"], "source": str(text_file), "files": [[".", text_file.stat().st_size, 5]]},
    }
    assert same_content(old, now)
    assert not same_content({**old, "held_out": {**now["held_out"], "hashes": []}}, now)
    old["identity"]["files"][0][1] += 1
    assert not same_content(old, now)


def test_the_hash_of_a_large_file_is_kept(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LARGE_FILE", 1)
    expected = hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert hashes.file_hash(text_file) == expected
    hashes._file_hash.cache_clear()  # another process
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(Path, "read_text", lambda path, **_: expected if path.parent.name == "hashes" else "")
    assert hashes.file_hash(text_file) == expected


def test_a_failed_build_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n" * 20)
    with pytest.raises(UserError):
        open_file(tmp_path / "bad.jsonl", tokenizer)
    assert left_behind() == []


def left_behind() -> list[str]:
    """Names in the cache, but for empty locks."""
    return [path.name for path in (store.cache_directory() / "stores").iterdir() if not path.name.endswith(".lock")]


def interrupted(path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal of a pass that was stopped after some batches."""

    def stop(documents: int, tokens: int) -> None:
        if documents >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "BATCH_CHARACTERS", 2000)
    data = DataConfig(sources=(SourceConfig(source=str(path)),), held_out_share=0.3)
    with pytest.raises(KeyboardInterrupt):
        open_store(data.sources[0], data, tokenizer, stop)
    (partial,) = left_behind()
    assert partial.endswith(".partial")
    return store.cache_directory() / "stores" / partial / "journal.jsonl"


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[RawDocument]]:
    """What the tokenizer is given from now on."""
    batches: list[list[RawDocument]] = []
    real = build._ids

    def watch(batch: list[RawDocument], *rest: Any) -> list[Any]:
        batches.append(batch)
        return real(batch, *rest)

    monkeypatch.setattr(build, "_ids", watch)
    return batches


def test_an_interrupted_pass_goes_on(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same store as without, and no text is tokenised twice but that of the batch that was cut off."""
    whole = open_file(text_file, tokenizer)
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "other"))
    journal = interrupted(text_file, tokenizer, monkeypatch)
    written = sum(len(line["train"]) + len(line["held_out"]) for line in map(json.loads, journal.open()))
    # The process died while it wrote the next batch.
    (journal.parent / "train.bin").open("ab").write(b"half a document")
    journal.open("a").write('{"train": [[12')
    batches = watch_batches(monkeypatch)
    again = open_file(text_file, tokenizer)
    assert 4 <= written < 12
    assert sum(map(len, batches)) == 12 - written
    for part, other in ((whole.train, again.train), (whole.held_out, again.held_out)):
        assert (part.tokens == other.tokens).all()
        assert (part.starts == other.starts).all() and (part.stops == other.stops).all()
    assert whole.summary == again.summary
    assert len(left_behind()) == 1


@pytest.mark.parametrize("damage", ["tokens lost", "journal damaged", "other documents"])
def test_what_cannot_be_taken_over_is_tokenised_again(
    damage: str, text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = open_file(text_file, tokenizer)
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "other"))
    journal = interrupted(text_file, tokenizer, monkeypatch)
    if damage == "tokens lost":
        (journal.parent / "train.bin").write_bytes(b"")
    elif damage == "journal damaged":
        journal.write_text("\0\0\n" + journal.read_text())
    else:  # what was tokenised has other hashes, and other tokens
        content_hash = json.loads(journal.read_text().split("\n")[0])["train"][0][1]
        journal.write_text(journal.read_text().replace(content_hash, "0" * 16))
        tokens = journal.parent / "train.bin"
        tokens.write_bytes(bytes(tokens.stat().st_size))
    again = open_file(text_file, tokenizer)
    assert (whole.train.tokens == again.train.tokens).all()
    assert whole.summary == again.summary


def test_a_source_that_breaks_off_keeps_what_was_tokenised(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is lost; the next try goes on."""
    real = build.read_documents

    def broken(*arguments: Any) -> Iterator[RawDocument]:
        yield from itertools.islice(real(*arguments), 9)
        raise UserError("the connection was lost")

    monkeypatch.setattr(build, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(build, "read_documents", broken)
    with pytest.raises(UserError, match="connection"):
        open_file(text_file, tokenizer)
    monkeypatch.setattr(build, "read_documents", real)
    batches = watch_batches(monkeypatch)
    open_file(text_file, tokenizer)
    assert 0 < sum(map(len, batches)) < 12


def test_batches_bound_memory(
    monkeypatch: pytest.MonkeyPatch, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """No call of the tokenizer gets more text than a batch and the document that filled it."""
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 2000)
    batches = watch_batches(monkeypatch)
    open_file(text_file, tokenizer)
    sizes = [sum(len(document.text) for document in batch) for batch in batches]
    assert len(sizes) >= 4
    assert max(sizes) < 2000 + 2000


def test_a_huge_document_is_tokenised_in_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer needs 100 to 250 bytes for a character of what it is given at once."""
    text = "\n".join("words and more words " * (i % 7) for i in range(500)) + "x" * 5000
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 2000)
    given: list[list[str]] = []
    real = build._encode
    monkeypatch.setattr(build, "_encode", lambda texts, *rest: (given.append(texts), real(texts, *rest))[1])
    path = tmp_path / "huge.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    data = DataConfig(sources=(SourceConfig(source=str(path)),), held_out_share=0.3)
    opened = open_store(data.sources[0], data, tokenizer)
    ids = np.concatenate(
        [
            opened.train.read(0, int(opened.train.stops[0])),
            opened.held_out.read(int(opened.held_out.starts[0]), int(opened.held_out.stops[0])),
        ]
    )
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert max(len(one) for texts in given for one in texts) <= 2000
    assert [len(texts) for texts in given] == [1] * len(given)


def test_documents_are_whole_whatever_the_tokenizer_asks_for(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its file may cut texts short or fill them up."""
    texts = text_file.read_text().splitlines()
    expected = sum(len(ids) for ids in tokenizer([json.loads(text)["text"] for text in texts])["input_ids"])
    tokenizer.backend_tokenizer.enable_truncation(50)
    tokenizer.backend_tokenizer.enable_padding(length=5000)
    store = open_file(text_file, tokenizer)
    assert store.train.lengths.sum() + store.held_out.lengths.sum() == expected


def test_a_tokenizer_in_python_will_do(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        """Without the compiled one behind it."""

        eos_token_id = tokenizer.eos_token_id
        get_vocab = tokenizer.get_vocab
        __call__ = staticmethod(tokenizer.__call__)

        def __len__(self) -> int:
            return len(tokenizer)

    fast, slow = open_file(text_file, tokenizer), open_file(text_file, Slow())  # type: ignore[arg-type]
    assert (fast.train.tokens == slow.train.tokens).all()
    assert (fast.held_out.tokens == slow.held_out.tokens).all()
