"""Documents in, from every kind of source; mistakes reported and counted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from skipwise import UserError
from skipwise.config import SourceConfig
from skipwise.data import sources
from skipwise.data.sources import ReadReport, check_source, is_hub_dataset, read_documents

TEXTS = ["first text", "second\ntext", "dritter Text: äöü"]


def read(path: Path, max_share: float = 0.01, **keywords: str) -> tuple[list[str], ReadReport]:
    report = ReadReport(max_share)
    source = SourceConfig(source=str(path), **keywords)
    return [document.text for document in read_documents(source, report, json.dumps)], report


def write(path: Path) -> Path:
    lines = "".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".zst":
            path.write_bytes(zstandard.compress(lines))
        case ".parquet":
            pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), path)
        case _:
            path.write_bytes(lines)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_records(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"data.{suffix}"))[0] == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_a_text_file_is_a_document(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_text(TEXTS[2], encoding="utf-8")
    assert read(tmp_path / f"a.{suffix}")[0] == [TEXTS[2]]


def test_a_directory_is_read_in_order_and_deep(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("deep")
    (tmp_path / "a.md").write_text("shallow")
    (tmp_path / "ignored.bin").write_bytes(b"\x00\xff")
    assert read(tmp_path)[0] == ["shallow", "deep"]


def test_builtin_python_is_there_and_long() -> None:
    documents, report = read(Path("builtin:python"))
    assert report.malformed == 0
    assert len(documents) > 200
    assert sum(map(len, documents)) > 5_000_000


def test_malformed_lines_are_counted_with_their_place(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(i)}).encode() for i in range(200)]
    lines[7] = b"{not json"
    lines[9] = b'{"text": "\xff"}'
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, report = read(path, max_share=0.02)
    assert len(documents) == 198
    assert report.malformed == 2
    assert f"{path}:8: not JSON" in report.examples[0]
    assert f"{path}:10" in report.examples[1]


def test_too_many_malformed_lines_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"txt": str(i)}) for i in range(10_000)))
    with pytest.raises(UserError, match=r"(?s)1\.0%.*no text in field 'text'.*data\.text_field"):
        read(path)
    assert len(read(path, text_field="txt")[0]) == 10_000


@pytest.mark.parametrize("good", [0, 100])
def test_reading_stops_early_when_most_is_malformed(tmp_path: Path, good: int) -> None:
    """A 10 GB file with a wrong field name must not be read to its end: the check runs as lines come."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps({"text": "x"})] * good + ["{"] * 5000))
    report = ReadReport(0.01)
    with pytest.raises(UserError):
        list(read_documents(SourceConfig(source=str(path)), report, json.dumps))
    assert report.records <= 102


def test_a_huge_text_file_is_held_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_BLOCK", 100)
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "huge.txt").write_text("".join(lines))
    parts, _ = read(tmp_path / "huge.txt")
    assert "".join(parts) == "".join(lines)
    assert len(parts) > 5
    assert all(len(part) < 120 and part.endswith("\n") for part in parts)


def test_no_more_documents_than_asked_for(tmp_path: Path) -> None:
    source = SourceConfig(source=str(write(tmp_path / "data.jsonl")), max_documents=2)
    assert len(list(read_documents(source, ReadReport(0.0), json.dumps))) == 2


def test_half_a_surrogate_pair_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "good"}\n')
    documents, report = read(tmp_path / "data.jsonl", max_share=0.5)
    assert documents == ["good"]
    assert "surrogate" in report.examples[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("data.docx", b"x", "no file of a kind"),
        ("broken.parquet", b"no parquet", "no readable Parquet"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 500, mtime=0)[:-20], "cannot be read"),
        ("broken.jsonl.zst", b"no zstandard", "cannot be read"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_an_unknown_builtin_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'builtin:python'"):
        check_source(SourceConfig(source="builtin:pyton"))


def test_a_hub_name_that_cannot_be_reached_is_explained() -> None:
    with pytest.raises(UserError, match="neither a path on this machine nor a hub dataset"):
        list(read_documents(SourceConfig(source="nobody/nothing"), ReadReport(0.01), json.dumps))


@pytest.mark.parametrize(("source", "at_a_hub"), [("a/b", True), ("builtin:python", False), (".", False), ("~", False)])
def test_what_has_to_be_asked_for_at_a_hub(source: str, at_a_hub: bool) -> None:
    assert is_hub_dataset(SourceConfig(source=source)) == at_a_hub
