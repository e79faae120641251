"""Documents tokenised once into a memory-mapped store, and their split into training and held-out."""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from skipwise.data.build import SCORED, Progress, build_store
from skipwise.data.config import DocumentsConfig, SourceConfig
from skipwise.data.sources import describe_source
from skipwise.utils.files import cache_directory, read_json

# Raise it when the layout of a store changes: older ones are then built anew.
LAYOUT = 1
# The same for stores of conversations alone.
CHAT_LAYOUT = 3
# Of a source that is one single document, its last fifth is held out.
SINGLE_DOCUMENT_HELD_OUT = 0.2


@dataclass(frozen=True)
class Documents:
    """Tokenised documents.

    Attributes:
        tokens: uint16 or uint32, memory-mapped: all documents, one after the other.
        starts, stops: int64[n], where each begins and ends. If the tokenizer has an end-of-text
            token, one lies between `stops[i]` and `starts[i + 1]`.
        scored: bool, memory-mapped, of conversations: which tokens the assistant says; None of texts.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    scored: NDArray[np.bool_] | None = None

    def largest_id(self) -> int:
        """Of all tokens; -1 where there are none."""
        return int(self.tokens.max()) if len(self.tokens) else -1

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[n]: tokens per document."""
        return self.stops - self.starts

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """int64[stop - start]: a copy of the tokens of a span."""
        return self.tokens[start:stop].astype(np.int64)


@dataclass(frozen=True)
class TokenStore:
    """One source, tokenised.

    Attributes:
        train, held_out: its documents, split by hash.
        summary: counts and the hashes of the held-out documents, for the run directory.
    """

    train: Documents
    held_out: Documents
    summary: dict[str, Any]


def fingerprint(source: SourceConfig, data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything the content of a store depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    identity = {
        "layout": LAYOUT,
        "source": describe_source(source),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "eos": tokenizer.eos_token_id,
        "held_out_share": data.held_out_share,
        "max_malformed_share": data.max_malformed_share,
    }
    if source.messages_field is not None:
        identity["chat_template"] = [str(tokenizer.chat_template), tokenizer.special_tokens_map, CHAT_LAYOUT]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _place(source: SourceConfig, data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    return cache_directory() / "stores" / fingerprint(source, data, tokenizer)


def is_stored(source: SourceConfig, data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing needs to be tokenised."""
    return _place(source, data, tokenizer).exists()


def open_store(
    source: SourceConfig,
    data: DocumentsConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress = lambda documents, tokens: None,
) -> TokenStore:
    """The store of a source, built first if it is not there yet.

    Args:
        on_progress: called with the numbers of documents and tokens written so far.

    Raises:
        UserError: when the source cannot be read or holds no text.
    """
    path = _place(source, data, tokenizer)
    if not path.exists():
        build_store(path, source, data, tokenizer, on_progress)
    return _load(path, source.source, split=data.held_out_share < 1)


def _load(path: Path, name: str, split: bool) -> TokenStore:
    summary = read_json(path / "store.json")
    train, train_hashes = _load_part(path, "train", summary)
    held_out, held_out_hashes = _load_part(path, "held_out", summary)
    rule = "document hash"
    if split and (not len(held_out) or not len(train)):
        # Few documents, all on one side of the threshold.
        everything, hashes = (train, train_hashes) if len(train) else (held_out, held_out_hashes)
        rule, train, held_out, held_out_hashes = split_few(everything, hashes)
    return TokenStore(
        train=train,
        held_out=held_out,
        summary={
            "source": name,  # the same content may have been read in another place
            **{key: summary[key] for key in ("identity", "report")},
            "split_by": rule,
            "train": {"documents": len(train), "tokens": int(train.lengths.sum())},
            "held_out": {
                "documents": len(held_out),
                "tokens": int(held_out.lengths.sum()),
                "hashes": held_out_hashes,
            },
        },
    )


def _load_part(path: Path, name: str, summary: dict[str, Any]) -> tuple[Documents, list[str]]:
    starts, stops = np.load(path / f"{name}.npy")
    file, dtype = path / f"{name}.bin", np.dtype(summary["dtype"])
    tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
    scored = None
    if (path / f"{name}{SCORED}").exists():
        marks = path / f"{name}{SCORED}"
        scored = np.memmap(marks, dtype=np.bool_, mode="r") if marks.stat().st_size else np.empty(0, np.bool_)
    return Documents(tokens, starts, stops, scored), summary[name]["hashes"]


def split_few(documents: Documents, hashes: list[str]) -> tuple[str, Documents, Documents, list[str]]:
    """Hold out something where the hashes hold out nothing (or everything).

    Of several documents the one with the lowest hash; of a single one its end.

    Returns:
        `(rule, train, held_out, held-out hashes)`
    """
    starts, stops = documents.starts, documents.stops
    if len(documents) == 1:
        cut = stops - (documents.lengths * SINGLE_DOCUMENT_HELD_OUT).astype(np.int64)
        rule = f"last {SINGLE_DOCUMENT_HELD_OUT:.0%} of the only document"
        return rule, replace(documents, stops=cut), replace(documents, starts=cut), hashes
    lowest = np.zeros(len(documents), dtype=bool)
    lowest[hashes.index(min(hashes))] = True
    train = replace(documents, starts=starts[~lowest], stops=stops[~lowest])
    return "lowest hash", train, replace(documents, starts=starts[lowest], stops=stops[lowest]), [min(hashes)]


# In a log, where no line can be changed.
SECONDS_BETWEEN_LINES = 60.0


def open_sources(data: DocumentsConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[TokenStore]:
    """The store of each source; what is not there yet is built."""
    return [_open(data, index, tokenizer, console) for index in range(len(data.sources))]


def _open(data: DocumentsConfig, index: int, tokenizer: PreTrainedTokenizerBase, console: Console) -> TokenStore:
    source = data.sources[index]
    with console.status(Text(f"tokenising {source.source}")) as status:
        last_line = time.monotonic()

        def progress(documents: int, tokens: int) -> None:
            nonlocal last_line
            line = Text(f"tokenising {source.source}: {documents:,} documents, {tokens:,} tokens")
            status.update(line)
            if not console.is_terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(line, highlight=False)

        if not console.is_terminal and not is_stored(source, data, tokenizer):
            console.print(f"tokenising {source.source}", highlight=False)
        store = open_store(source, data, tokenizer, progress)
    report = store.summary["report"]
    train, held_out = store.summary["train"], store.summary["held_out"]
    counts = (
        f"{held_out['tokens']:,} tokens in {held_out['documents']:,} documents"
        if data.held_out_share == 1
        else f"{train['tokens']:,} tokens in {train['documents']:,} documents to train on, "
        f"{held_out['documents']:,} held out by {store.summary['split_by']}"
    )
    malformed = f"; {report['malformed']} of {report['records']} records malformed" if report["malformed"] else ""
    console.print(f"{source.source}: {counts}{malformed}", highlight=False)
    for example in report["examples"]:
        console.print(f"  skipped {example}", highlight=False)
    return store
