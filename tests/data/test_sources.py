"""Documents in, from every kind of source; mistakes reported and counted."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skipwise import UserError
from skipwise.data import sources
from skipwise.data.config import SourceConfig
from skipwise.data.sources import ReadReport, check_source, is_hub_dataset, read_documents

TEXTS = ["first text", "second\ntext", "dritter Text: äöü"]


def read(path: Path, max_share: float = 0.01, **keywords: str) -> tuple[list[str], ReadReport]:
    report = ReadReport(max_share)
    source = SourceConfig(source=str(path), **keywords)
    return [document.text for document in read_documents(source, report, json.dumps)], report


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


def write(path: Path) -> Path:
    lines = "".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".zst":
            path.write_bytes(zstd(lines))
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
        ("broken.parquet", b"no parquet", "cannot be read"),
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


LINES = b"".join(json.dumps({"text": f"{i} äöü {i * i}"}, ensure_ascii=False).encode() + b"\n" for i in range(2000))


@pytest.mark.parametrize("cut", [1, 4, 1000])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path: Path, suffix: str, cut: int) -> None:
    """However many malformed records are allowed. Of plain text only half a character gives a cut away."""
    path = tmp_path / f"data.{suffix}"
    match suffix:
        case "jsonl":
            path.write_bytes(LINES[: -1 - cut])
        case "jsonl.gz":
            path.write_bytes(gzip.compress(LINES)[:-cut])
        case "jsonl.zst":
            path.write_bytes(zstd(LINES)[:-cut])
        case "parquet":
            pq.write_table(pa.table({"text": [str(i) for i in range(500)]}), path)
            path.write_bytes(path.read_bytes()[:-cut])
        case "txt":
            path.write_bytes("ä".encode() * cut + b"\xc3")
    with pytest.raises(UserError) as caught:
        read(path, max_share=1.0)
    assert caught.value.code == "unreadable_data"
    assert str(path) in str(caught.value)


def test_damaged_pages_of_a_parquet_file_are_an_error(tmp_path: Path) -> None:
    """Its footer is whole, so that it opens."""
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(500)]}), path)
    content = bytearray(path.read_bytes())
    content[200:2000] = b"\xff" * 1800
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path, max_share=1.0)
    assert caught.value.code == "unreadable_data"
    assert str(path) in str(caught.value)


def test_frames_in_a_row_are_one_file(tmp_path: Path) -> None:
    """As parallel compressors write it."""
    path = tmp_path / "data.jsonl.zst"
    half = LINES[: len(LINES) // 2]
    path.write_bytes(zstd(half) + zstd(LINES[len(half) :]))
    assert len(read(path)[0]) == 2000


def test_a_row_that_is_not_utf8_is_one_malformed_record(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", "süß".encode()], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "data.parquet")
    documents, report = read(tmp_path / "data.parquet", max_share=0.5)
    assert documents == ["good", "süß"]
    assert (report.records, report.malformed) == (3, 1)
    assert "row 2" in report.examples[0]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'["text"]', b'{"text": null}'])
def test_a_line_of_another_kind_is_one_malformed_record(tmp_path: Path, line: bytes) -> None:
    """Brackets that nobody closes, numbers without end, lists, null."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n" + b'{"text": "also good"}\n')
    documents, report = read(path, max_share=0.5)
    assert documents == ["good", "also good"]
    assert (report.records, report.malformed) == (3, 1)


def peak(call: Callable[[], object]) -> int:
    """The largest number of bytes that Python holds during a call, above what it held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_without_end_is_skipped_in_bounded_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LINE_BYTES", 10_000)
    longest = b'{"text": "' + b"x" * (10_000 - 12) + b'"}'
    lines = longest[:-1] + b"\n" + longest + b"\n" + b"y" * 5_000_000 + b'\n{"text": "good"}\n'
    path = tmp_path / f"data.{suffix}"
    path.write_bytes({"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstd}[suffix](lines))
    found: list[tuple[list[str], ReadReport]] = []
    assert peak(lambda: found.append(read(path, max_share=0.8))) < 1_000_000
    documents, report = found[0]
    assert documents == ["good"]
    assert (report.records, report.malformed) == (4, 3)
    assert "10,000 bytes" in report.examples[-1]


def test_large_rows_of_parquet_are_held_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PARQUET_BYTES", 1_000_000)
    rows = [chr(65 + i) * 400_000 for i in range(40)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": rows}), path, compression="none", use_dictionary=False, write_batch_size=1)
    held = []

    def look() -> None:
        for number, document in enumerate(read_documents(SourceConfig(source=str(path)), ReadReport(0.0), json.dumps)):
            assert document.text == rows[number]
            held.append(pa.total_allocated_bytes())

    assert peak(look) < 1_500_000
    assert max(held) < 5_000_000


def test_a_text_file_without_line_ends_is_held_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_BLOCK", 100)
    (tmp_path / "huge.txt").write_text("x" * 1050)
    parts, report = read(tmp_path / "huge.txt")
    assert list(map(len, parts)) == [200] * 5 + [50]
    assert report.records == 1


def test_an_unknown_builtin_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'builtin:python'"):
        check_source(SourceConfig(source="builtin:pyton"))


def test_a_hub_name_that_cannot_be_reached_is_explained() -> None:
    with pytest.raises(UserError, match="neither a path on this machine nor a hub dataset"):
        list(read_documents(SourceConfig(source="nobody/nothing"), ReadReport(0.01), json.dumps))


@pytest.mark.parametrize(("source", "at_a_hub"), [("a/b", True), ("builtin:python", False), (".", False), ("~", False)])
def test_what_has_to_be_asked_for_at_a_hub(source: str, at_a_hub: bool) -> None:
    assert is_hub_dataset(SourceConfig(source=source)) == at_a_hub
