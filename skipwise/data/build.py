"""Building a token store, batch after batch, so that an interrupted pass goes on where it stopped."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from skipwise.data.chat import conversation, scored_tokens
from skipwise.data.config import DocumentsConfig, SourceConfig
from skipwise.data.sources import RawDocument, ReadReport, describe_source, read_documents
from skipwise.errors import UserError
from skipwise.utils.files import append_line, read_lines, short_hash, write_json

# Texts are handed to the tokenizer in batches of about this many characters.
BATCH_CHARACTERS = 2_000_000
# One line per batch: (tokens, hash) of its documents, by part.
JOURNAL = "journal.jsonl"

Progress = Callable[[int, int], None]
Ids = NDArray[np.unsignedinteger[Any]]
# Ids, and of a conversation which of them the assistant says.
Encoded = tuple[Ids, NDArray[np.bool_] | None]
# Of a file beside the tokens of conversations: a byte for each.
SCORED = ".scored"


def build_store(
    path: Path,
    source: SourceConfig,
    data: DocumentsConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress,
) -> None:
    """Write the store of a source to `path`, unless it is there.

    One process builds, others that want the same store wait for it. What an interrupted one has written is taken over,
    if the source still begins with the same documents.

    Raises:
        UserError: when the source cannot be read or holds no text. What was tokenised before is kept for the next try.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        partial.mkdir(exist_ok=True)
        try:
            _write(partial, source, data, tokenizer, on_progress)
        except UserError:
            if not (partial / JOURNAL).exists():
                shutil.rmtree(partial)
            raise
        partial.replace(path)
        (path / JOURNAL).unlink()


def _write(
    path: Path, source: SourceConfig, data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase, on_progress: Progress
) -> None:
    largest = max(tokenizer.get_vocab().values())  # ids may have holes between them
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    chat = source.messages_field is not None
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(_Part(path / f"{name}.bin", dtype, tokenizer.eos_token_id, chat))
            for name in ("train", "held_out")
        }
        report = ReadReport(data.max_malformed_share)
        documents = read_documents(source, report, partial(conversation, tokenizer=tokenizer))
        if not _take_over(path / JOURNAL, parts, documents, data.held_out_share):
            (path / JOURNAL).unlink()
            for part in parts.values():
                part.take_over([])
            report = ReadReport(data.max_malformed_share)
            documents = read_documents(source, report, partial(conversation, tokenizer=tokenizer))
        for batch, encoded in _encoded(_batches(documents), tokenizer, dtype):
            line: dict[str, list[tuple[int, str]]] = {name: [] for name in parts}
            for document, (ids, scored) in zip(batch, encoded, strict=True):
                content_hash = short_hash(document.key)
                name = _part_of(content_hash, data.held_out_share)
                parts[name].add(ids, content_hash, scored)
                line[name].append((len(ids), content_hash))
            for part in parts.values():
                part.sync()
            append_line(path / JOURNAL, line)  # after the tokens it speaks of
            on_progress(
                sum(len(part.lengths) for part in parts.values()), sum(part.position for part in parts.values())
            )
        if not any(part.lengths for part in parts.values()):
            raise UserError(
                f"{source.source} holds no text. Give --data a source with text in field {source.text_field!r}.",
                code="source_has_no_text",
            )
        content = {"identity": describe_source(source), "dtype": dtype.name}
        finished = {name: part.finish() for name, part in parts.items()}
        write_json(path / "store.json", {**content, "report": asdict(report), **finished})


def _take_over(journal: Path, parts: dict[str, "_Part"], documents: Iterator[RawDocument], share: float) -> bool:
    """Go on after what a journal speaks of: False where tokens are lost, or the source begins with other documents."""
    try:
        lines = read_lines(journal)
    except UserError:  # damaged
        return False
    if not all(part.take_over([entry for line in lines for entry in line[name]]) for name, part in parts.items()):
        return False
    expected = {name: iter(part.hashes) for name, part in parts.items()}
    for document in islice(documents, sum(len(part.hashes) for part in parts.values())):
        content_hash = short_hash(document.key)
        if next(expected[_part_of(content_hash, share)], None) != content_hash:
            return False
    return all(next(rest, None) is None for rest in expected.values())


class _Part:
    """One of the two halves of a store while it is written."""

    def __init__(self, path: Path, dtype: np.dtype[Any], eos: int | None, chat: bool) -> None:
        self.path, self.dtype, self.eos = path, dtype, eos
        self.file = path.open("ab")
        self.scored = path.with_suffix(SCORED).open("ab") if chat else None
        self.position = 0
        self.lengths: list[int] = []
        self.hashes: list[str] = []

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.scored is not None:
            self.scored.close()

    def take_over(self, entries: list[tuple[int, str]]) -> bool:
        """Hold these documents of an interrupted pass, and nothing written after them; False if they are lost."""
        self.position, self.lengths, self.hashes = 0, [], []
        for length, content_hash in entries:
            self._count(length, content_hash)
        size = self.position * self.dtype.itemsize
        there = self.path.stat().st_size >= size
        self.file.truncate(size)
        if self.scored is not None:
            there &= self.path.with_suffix(SCORED).stat().st_size >= self.position
            self.scored.truncate(self.position)
        return there

    def add(self, ids: Ids, content_hash: str, scored: NDArray[np.bool_] | None) -> None:
        self.file.write(ids.data)
        if self.eos is not None:
            self.file.write(self.dtype.type(self.eos).tobytes())
        if self.scored is not None and scored is not None:
            self.scored.write(scored.tobytes() + b"\0" * (self.eos is not None))
        self._count(len(ids), content_hash)

    def sync(self) -> None:
        """Have it on the disk, whatever happens to the machine."""
        for file in (self.file, self.scored):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> dict[str, Any]:
        """Write where documents begin and end; what to say of them."""
        lengths = np.array(self.lengths, dtype=np.int64)
        stops = (lengths + (self.eos is not None)).cumsum() - (self.eos is not None)
        np.save(self.path.with_suffix(".npy"), np.array([stops - lengths, stops], dtype=np.int64).reshape(2, -1))
        return {"documents": len(lengths), "tokens": int(lengths.sum()), "hashes": self.hashes}

    def _count(self, length: int, content_hash: str) -> None:
        self.lengths.append(length)
        self.hashes.append(content_hash)
        self.position += length + (self.eos is not None)


def is_held_out(content_hash: str, share: float) -> bool:
    """Whether a document with this hash is among the `share` kept for evaluation."""
    return int(content_hash, 16) < share * 2**64


def _part_of(content_hash: str, share: float) -> str:
    return "held_out" if is_held_out(content_hash, share) else "train"


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Lists of documents of about `BATCH_CHARACTERS` together: bounded memory, busy tokenizer."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str, size: int) -> Iterator[tuple[int, str]]:
    """(begin, piece) of a text, in pieces of at most `size` characters that most tokenizers encode as they encode it.

    They end at the last line end of a piece, else before its last word. A tokenizer that marks the beginning of a text
    marks that of every piece.

    >>> list(_pieces("one two\\nthree four", 9))
    [(0, 'one two\\n'), (8, 'three'), (13, ' four')]
    """
    begin = 0
    while len(text) - begin > size:
        stop = begin + size
        line, word = (_last(mark, text, begin + 1, stop) for mark in "\n ")
        stop = line + 1 if line > 0 else word if word > 0 else stop
        yield begin, text[begin:stop]
        begin = stop
    yield begin, text[begin:]


def _last(mark: str, text: str, begin: int, stop: int) -> int:
    """Where a mark stands last that no white space follows; -1 if it stands nowhere."""
    found = text.rfind(mark, begin, stop)
    while found > 0 and text[found + 1].isspace():
        found = text.rfind(mark, begin, found)
    return found


def _ids(batch: list[RawDocument], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> list[Encoded]:
    """The ids of each document, without those of the beginning and the end of a text.

    A tokenizer takes 100 to 250 bytes for a character, so no call gets much more than `BATCH_CHARACTERS`.
    """
    if all(len(document.text) <= BATCH_CHARACTERS for document in batch):
        return _encode(
            [document.text for document in batch], [document.answers for document in batch], tokenizer, dtype
        )
    encoded = []
    for document in batch:
        parts = []
        for begin, piece in _pieces(document.text, BATCH_CHARACTERS):
            answers = document.answers and tuple((start - begin, stop - begin) for start, stop in document.answers)
            parts += _encode([piece], [answers], tokenizer, dtype)
        ids, scored = zip(*parts, strict=True)
        encoded.append((np.concatenate(ids), None if document.answers is None else np.concatenate(scored)))
    return encoded


def _encode(
    texts: list[str],
    answers: list[tuple[tuple[int, int], ...] | None],
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype[Any],
) -> list[Encoded]:
    """The ids of some texts, and of conversations what the assistant says."""
    if answers and answers[0] is not None:
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(one.ids, dtype), np.array(scored_tokens(one.offsets, spans or ()), bool))
            for one, spans in zip(encodings, answers, strict=True)
        ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        lists = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        # Called itself, the tokenizer makes lists that nobody reads, which takes as long as tokenising.
        lists = (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
    return [(np.fromiter(ids, dtype, len(ids)), None) for ids in lists]


def _encoded(
    batches: Iterable[list[RawDocument]], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]
) -> Iterator[tuple[list[RawDocument], list[Encoded]]]:
    """Batches with the ids of their documents, in order.

    Two at a time: while Python makes lists of ids, which keeps its other threads waiting, the next batch is tokenised.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # A tokenizer's file may ask for both; only a call of the tokenizer itself would take them back.
        backend.no_truncation()
        backend.no_padding()
    waiting = deque[tuple[list[RawDocument], Future[list[Encoded]]]]()
    with ThreadPoolExecutor(max_workers=1 if backend is None else 2) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_ids, batch, tokenizer, dtype)))
            if len(waiting) > 2:
                first, ids = waiting.popleft()
                yield first, ids.result()
        for last, ids in waiting:
            yield last, ids.result()
