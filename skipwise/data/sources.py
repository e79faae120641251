"""Documents from files, directories, hub datasets and the Python standard library. One at a time."""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from skipwise.data import builtin
from skipwise.data.config import SourceConfig
from skipwise.errors import UserError, nearest
from skipwise.utils.files import file_hash

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# Where a record stands, and what stands there.
Record = tuple[str, object]
# Before this many records a single bad one would be a large share.
MALFORMED_GRACE = 100
NO_UNICODE = "half of a surrogate pair, which is no Unicode text"
# Characters of a text file that are held at a time.
TEXT_BLOCK = 16_000_000
# Bytes of a line that are read; a longer line is one malformed record, so that memory is bounded whatever the file.
LINE_BYTES = 2**26
# Bytes of a Parquet file that are decoded at a time, if no row is larger.
PARQUET_BYTES = 2**24


@dataclass(frozen=True)
class Conversation:
    """A conversation as text, and where in it the assistant speaks: (begin, end) in characters."""

    text: str
    answers: tuple[tuple[int, int], ...]


# Makes one of messages.
Write = Callable[[list[dict[str, Any]]], Conversation]


class MessagesError(UserError):
    """A conversation that a chat template does not take."""


@dataclass(frozen=True)
class RawDocument:
    """A text and the key that decides, by its hash, whether it is held out; of a conversation what is an answer."""

    key: str
    text: str
    answers: tuple[tuple[int, int], ...] | None = None


@dataclass
class ReadReport:
    """What happened while a source was read.

    Attributes:
        max_malformed_share: more than this share of bad records stops the reading.
        records: lines, rows or files seen.
        malformed: how many of them could not be used.
        examples: the first few reasons, each with file and line.
    """

    max_malformed_share: float
    records: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)

    def reject(self, where: str, why: str) -> None:
        """Count a record that cannot be used; stop early where most are bad."""
        self.malformed += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {why}")
        if self.records >= MALFORMED_GRACE:
            self.check()

    def check(self) -> None:
        """Raise `UserError` when too many records were rejected."""
        if self.malformed > self.max_malformed_share * self.records:
            raise UserError(
                f"At most {self.max_malformed_share:.1%} of the records may be malformed, but "
                f"{self.malformed} of {self.records} are:\n"
                + "\n".join(f"  - {example}" for example in self.examples)
                + "\nMend them, name the right field (data.text_field, data.messages_field), or raise "
                "data.max_malformed_share.",
                code="too_many_malformed_records",
            )


def files_of(path: Path) -> list[Path]:
    """The readable files of a path: itself, or those below a directory, sorted."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and suffix_of(p) and not p.name.startswith("."))


def suffix_of(path: Path) -> str | None:
    """The suffix by which a file is read, or None."""
    return next((s for s in (*TEXT_SUFFIXES, *RECORD_SUFFIXES) if path.name.lower().endswith(s)), None)


def check_source(config: SourceConfig) -> None:
    """Raise `UserError` for a source that certainly cannot be read; opens nothing big."""
    name = config.source
    records = Path(name).is_dir() or Path(name).name.lower().endswith(RECORD_SUFFIXES) or _is_hub_name(name)
    if config.messages_field is not None and not records:
        raise UserError(
            f"messages_field is for records ({', '.join(RECORD_SUFFIXES)}, hub datasets), but {name} is text. Set it "
            "for the sources that have one alone.",
            code="not_a_record_source",
        )
    if name.startswith("builtin:"):
        if name != builtin.PYTHON:
            raise UserError(
                f"There is no built-in source {name!r}.{nearest(name, [builtin.PYTHON])}", code="unknown_builtin_source"
            )
        return
    path = Path(name).expanduser()
    if not path.exists():
        if _is_hub_name(name):
            return
        raise UserError(
            f"A source (--data) must be a file, directory, hub dataset or {builtin.PYTHON}, but {name} does not exist.",
            code="data_not_found",
        )
    files = files_of(path)
    kinds = ", ".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))
    if not files or (path.is_file() and not suffix_of(path)):
        raise UserError(f"{name} holds no file of a kind that can be read ({kinds}).", code="data_format_not_supported")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{name} is empty. Give --data a source with text in it.", code="source_has_no_text")


def is_hub_dataset(config: SourceConfig) -> bool:
    """Whether a source has to be asked for at a hub, by its name alone."""
    return config.source != builtin.PYTHON and not Path(config.source).expanduser().exists()


def _is_hub_name(name: str) -> bool:
    """`organisation/name`: one slash, and nothing that makes it a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not suffix_of(Path(name))


def read_documents(config: SourceConfig, report: ReadReport, write: Write) -> Iterator[RawDocument]:
    """Stream the documents of a source, counting what is skipped.

    Args:
        write: a conversation as text.

    Raises:
        UserError: when too many records are malformed, or a file cannot be read at all.
    """
    documents = (document for document in _open(config, report, write) if document.text.strip())
    yield from islice(documents, config.max_documents)
    report.check()


def read_records(config: SourceConfig, report: ReadReport) -> Iterator[Record]:
    """Stream the records of JSONL or Parquet files, or of a hub dataset, with all their fields.

    Yields:
        (where it stands, the record)

    Raises:
        UserError: when a file cannot be read, or has no records.
    """
    check_source(config)
    path = Path(config.source).expanduser()
    if config.source == builtin.PYTHON or (path.is_file() and suffix_of(path) not in RECORD_SUFFIXES):
        raise UserError(
            f"{config.source} has no records. Give one of {', '.join(RECORD_SUFFIXES)}, or a hub dataset.",
            code="not_a_record_source",
        )
    if path.exists():
        for file in files_of(path):
            if suffix_of(file) in RECORD_SUFFIXES:
                yield from _read_file(file, None, report)
    else:
        yield from _read_hub(config, report)


def _open(config: SourceConfig, report: ReadReport, write: Write) -> Iterator[RawDocument]:
    check_source(config)
    path = Path(config.source).expanduser()
    if config.source == builtin.PYTHON:
        for key, text in builtin.python_documents():
            report.records += 1
            yield RawDocument(key, text)
    elif path.exists():
        for file in files_of(path):
            if suffix_of(file) in TEXT_SUFFIXES:
                if config.messages_field is None:
                    yield from _read_text(file, report)
            else:
                for where, record in _read_file(file, config.messages_field or config.text_field, report):
                    yield from _document_of(record, config, where, report, write)
    else:
        for where, record in _read_hub(config, report):
            yield from _document_of(record, config, where, report, write)


def _read_file(path: Path, only: str | None, report: ReadReport) -> Iterator[Record]:
    """The records of a file; of a Parquet file one column `only`, if it is given."""
    import pyarrow as pa

    try:
        if suffix_of(path) == ".parquet":
            yield from _read_parquet(path, only, report)
        else:
            yield from _read_jsonl(path, report)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} cannot be read: {why}. If it is damaged or was cut off, fetch it again.", code="unreadable_data"
    )


def _read_text(path: Path, report: ReadReport) -> Iterator[RawDocument]:
    """A file is a document; a huge one is several, cut at line ends."""
    report.records += 1
    try:
        with path.open(encoding="utf-8") as file:
            while text := file.read(TEXT_BLOCK):
                text += file.readline(TEXT_BLOCK) if len(text) == TEXT_BLOCK else ""
                yield RawDocument(text, text)
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise _unreadable(path, "its last character is not whole") from error
        report.reject(str(path), f"not UTF-8 ({error.reason})")
    except OSError as error:
        raise _unreadable(path, str(error)) from error


def _read_jsonl(path: Path, report: ReadReport) -> Iterator[Record]:
    # Bytes, so that one line that is no UTF-8 does not end the whole file.
    with _open_binary(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            if line is not None and not line.strip():
                continue
            report.records += 1
            where = f"{path}:{number}"
            if line is None:
                report.reject(where, f"longer than {LINE_BYTES:,} bytes; divide it into several records")
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors alike; brackets in brackets
                if not line.endswith(b"\n"):
                    raise _unreadable(path, f"line {number}, its last, is not whole ({error})") from error
                report.reject(where, f"not JSON ({error})")
            else:
                yield where, record


def _lines(file: io.BufferedIOBase) -> Iterator[bytes | None]:
    """The lines of a file, None in place of one that is longer than `LINE_BYTES`."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) <= LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)
        yield None


def _open_binary(path: Path) -> io.BufferedIOBase:
    match suffix_of(path):
        case ".jsonl.gz":
            return gzip.open(path)
        case ".jsonl.zst":
            import pyarrow as pa

            # It notices where a file was cut off; most readers of Zstandard take that for its end.
            return io.BufferedReader(pa.CompressedInputStream(path.open("rb"), "zstd"))
        case _:
            return path.open("rb")


def _read_parquet(path: Path, only: str | None, report: ReadReport) -> Iterator[Record]:
    import pyarrow.parquet as pq

    # A stream of pages; otherwise a whole row group is held, whose size is the writer's choice.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        if only is not None and only not in file.schema_arrow.names:
            raise UserError(
                f"{path} has no column {only!r}. Set data.text_field (or messages_field) to one of "
                f"{file.schema_arrow.names}.",
                code="column_not_found",
            )
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group)
            rows = PARQUET_BYTES * size.num_rows // max(1, size.total_byte_size)
            columns = None if only is None else [only]
            for batch in file.iter_batches(min(256, max(1, rows)), row_groups=[group], columns=columns):
                for values in zip(*batch.columns, strict=True):
                    row += 1
                    report.records += 1
                    where = f"{path} row {row}"
                    try:
                        record = dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
                    except (ValueError, OverflowError) as error:  # no UTF-8, a time that Python cannot express
                        report.reject(where, f"not readable ({error})")
                    else:
                        yield where, record


def _read_hub(config: SourceConfig, report: ReadReport) -> Iterator[Record]:
    """Streamed, so that a dataset larger than the disk can be sampled; needs the network."""
    import datasets

    try:
        stream = datasets.load_dataset(
            config.source,
            config.subset,
            data_files=config.data_files,
            split=config.split,
            revision=config.revision,
            streaming=True,
        )
        for row, record in enumerate(stream):
            report.records += 1
            yield f"{config.source} row {row}", record
    except Exception as error:  # of the library, and of what it calls: HTTP, files of all formats, code of a dataset
        raise UserError(
            f"{config.source!r} is neither a path on this machine nor a hub dataset that could be opened "
            f"(split {config.split!r}): {error}",
            code="hub_dataset_unavailable",
        ) from error


def _document_of(
    record: object, config: SourceConfig, where: str, report: ReadReport, write: Write
) -> Iterator[RawDocument]:
    """The document of one record, or nothing and a note in the report."""
    if config.messages_field is not None:
        yield from _conversation_of(record, config.messages_field, where, report, write)
        return
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        report.reject(where, f"no text in field {config.text_field!r}")
    elif not _is_unicode(text):
        report.reject(where, NO_UNICODE)
    else:
        yield RawDocument(text, text)


def _conversation_of(record: object, name: str, where: str, report: ReadReport, write: Write) -> Iterator[RawDocument]:
    """A list of messages, at least one of the assistant, as the chat template writes it."""
    value = record.get(name) if isinstance(record, dict) else None
    messages = value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else []
    whole = all(isinstance(one.get(key), str) for one in messages for key in ("role", "content"))
    if not whole or not any(one["role"] == "assistant" for one in messages):
        report.reject(where, f"no messages with role and text as content, one the assistant's, in field {name!r}")
        return
    try:
        written, key = write(messages), json.dumps(messages, default=str)
    except (MessagesError, RecursionError) as error:
        report.reject(where, str(error))
        return
    if not _is_unicode(written.text):
        report.reject(where, NO_UNICODE)
        return
    yield RawDocument(key, written.text, written.answers)


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded, which halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe_source(config: SourceConfig) -> dict[str, Any]:
    """What identifies the content of a source: hashes of its files, wherever they are; or names and versions."""
    path = Path(config.source).expanduser()
    # What came later is not in the names of stores made before.
    later = {"messages_field"} if config.messages_field is None else set()
    identity = config.model_dump(exclude={"weight", *later})
    if config.source == builtin.PYTHON:
        return identity | {"python": sys.version}
    if path.exists():
        # Names decide the order in a directory, and how a file is read.
        names = [(suffix_of(path) if file == path else str(file.relative_to(path)), file) for file in files_of(path)]
        return identity | {
            "source": "file" if path.is_file() else "directory",
            "files": [(name, file.stat().st_size, file_hash(file)) for name, file in names],
        }
    return identity


def same_content(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two summaries of a tokenised source, each with its identity, are of the same content.

    Runs that were begun when files were identified by their times and places are compared by the sizes of the files
    and by what was read from them.
    """
    if not any(isinstance(file[2], int) for file in before["identity"].get("files", [])):
        aside = {"source", "report"} if "files" in now["identity"] else set()  # they name the place
        return {key: before[key] for key in before.keys() - aside} == {key: now[key] for key in now.keys() - aside}
    counts = ("train", "held_out", "split_by")
    sizes = [[file[1] for file in one["identity"].get("files", [])] for one in (before, now)]
    return sizes[0] == sizes[1] and all(before[key] == now[key] for key in counts)
