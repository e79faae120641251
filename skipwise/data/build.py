"""Building a token store, batch after batch, so that an interrupted pass goes on where it stopped."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from skipwise.config import DocumentsConfig, SourceConfig
from skipwise.data.sources import RawDocument, ReadReport, describe_source, read_documents
from skipwise.digests import short_digest
from skipwise.errors import UserError
from skipwise.runs import append_line, read_lines, write_json

# Texts are handed to the tokenizer in batches of about this many characters.
BATCH_CHARACTERS = 2_000_000

Progress = Callable[[int, int], None]


def build_store(
    path: Path,
    source: SourceConfig,
    data: DocumentsConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress,
) -> None:
    """Write the store of a source to `path`, unless it is there.

    One process builds, others that want the same store wait for it. What an interrupted one has written is taken over.

    Raises:
        UserError: when the source cannot be read or holds no text; nothing is then left behind.
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
            shutil.rmtree(partial)
            raise
        partial.replace(path)


def _write(
    path: Path, source: SourceConfig, data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase, on_progress: Progress
) -> None:
    report = ReadReport(data.max_malformed_share)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    journal = path / "journal.jsonl"
    parts = {name: _Part(path / f"{name}.bin", dtype, tokenizer.eos_token_id) for name in ("train", "held_out")}
    before = read_lines(journal)
    if not all(part.take_over([entry for line in before for entry in line[name]]) for name, part in parts.items()):
        raise UserError(f"{path} lost what it held, and was removed. Start again.")
    done = sum(len(part.lengths) for part in parts.values())
    batches = _batches(islice(read_documents(source, report), done, None))
    for batch, encoded in _encoded(batches, tokenizer):
        line: dict[str, list[tuple[int, str]]] = {name: [] for name in parts}
        for document, ids in zip(batch, encoded, strict=True):
            digest = short_digest(document.key)
            name = "held_out" if is_held_out(digest, data.held_out_share) else "train"
            parts[name].add(ids, digest)
            line[name].append((len(ids), digest))
        for part in parts.values():
            part.file.flush()
        append_line(journal, line)  # after the tokens it speaks of
        on_progress(sum(len(part.lengths) for part in parts.values()), sum(part.position for part in parts.values()))
    if not any(part.lengths for part in parts.values()):
        raise UserError(
            f"{source.source} holds no text. Give --data a source with text in field {source.text_field!r}."
        )
    content = {"source": source.source, "identity": describe_source(source), "dtype": dtype.name}
    closed = {name: part.close() for name, part in parts.items()}
    write_json(path / "store.json", {**content, "report": asdict(report), **closed})
    journal.unlink()


class _Part:
    """One of the two halves of a store while it is written."""

    def __init__(self, path: Path, dtype: np.dtype[Any], eos: int | None) -> None:
        self.path, self.dtype, self.eos = path, dtype, eos
        self.file = path.open("ab")
        self.position = 0
        self.lengths: list[int] = []
        self.hashes: list[str] = []

    def take_over(self, entries: list[tuple[int, str]]) -> bool:
        """Keep these documents of an interrupted pass, and nothing that was written after them; False if they are lost.

        A machine that went down may have kept the journal and not the tokens.
        """
        for length, digest in entries:
            self._count(length, digest)
        size = self.position * self.dtype.itemsize
        there = self.path.stat().st_size >= size
        self.file.truncate(size)
        return there

    def add(self, ids: list[int], digest: str) -> None:
        self.file.write(np.asarray(ids if self.eos is None else [*ids, self.eos], dtype=self.dtype).tobytes())
        self._count(len(ids), digest)

    def close(self) -> dict[str, Any]:
        self.file.close()
        lengths = np.array(self.lengths, dtype=np.int64)
        stops = (lengths + (self.eos is not None)).cumsum() - (self.eos is not None)
        np.save(self.path.with_suffix(".npy"), np.array([stops - lengths, stops], dtype=np.int64).reshape(2, -1))
        return {"documents": len(lengths), "tokens": int(lengths.sum()), "hashes": self.hashes}

    def _count(self, length: int, digest: str) -> None:
        self.lengths.append(length)
        self.hashes.append(digest)
        self.position += length + (self.eos is not None)


def is_held_out(digest: str, share: float) -> bool:
    """Whether a document with this hash is among the `share` kept for evaluation."""
    return int(digest, 16) < share * 2**64


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


def _encoded(
    batches: Iterable[list[RawDocument]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[RawDocument], list[list[int]]]]:
    """Batches with the ids of their documents; the next is tokenised while one is written."""

    def encode(batch: list[RawDocument]) -> list[list[int]]:
        # Lists that nobody reads take as long as tokenising.
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for batch in batches:
            following = batch, pool.submit(encode, batch)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
