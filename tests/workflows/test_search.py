"""`skipwise search`, end to end."""

import json
from pathlib import Path

import yaml

from skipwise.config.files import parse_config
from tests.commands import error_code, skipwise


def test_a_search_goes_on_and_its_result_is_a_configuration(
    pico_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "search"
    flags = ("search", pico_directory, "--target", 256, "--data", text_file, "--output", output)
    flags += ("--documents", 2, "--population", 3, "--set", "model.dtype=float32")
    short = skipwise(*flags, "--generations", 1)
    assert "generation 1 of 1" in short
    (output / "losses.jsonl").open("a").write('{"factors": [1.0')  # a process that died
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()[:-1]]
    refused = skipwise(*flags, "--generations", 1, "--fitness", "text", code=2)
    assert error_code(refused) == "configuration_changed"
    # As if it had known nothing of the last of them.
    kept = lines[:-1]
    (output / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    before = yaml.safe_load((output / "rope.yaml").read_text())
    skipwise(*flags, "--generations", 1)
    again = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    assert [line["factors"] for line in again] == [line["factors"] for line in lines]
    assert yaml.safe_load((output / "rope.yaml").read_text()) == before
    best = min(again, key=lambda line: line["loss"])
    assert before["rope"]["long_factors"] == best["factors"]
    values = {"model": {"path": str(pico_directory)}, "lengths": {"target": 256}, "data": str(text_file), **before}
    assert parse_config(values).rope.name == "mixed"


def test_what_is_refused(pico_directory: Path, text_file: Path, tmp_path: Path) -> None:
    flags = ("search", pico_directory, "--target", 4096, "--data", text_file, "--output", tmp_path / "search")
    misspelt = skipwise(*flags, "--fitness", "needle", code=2)
    assert error_code(misspelt) == "unknown_choice" and "'needles'" in misspelt
    assert error_code(skipwise(*flags, "--fitness", "text", code=2)) == "documents_too_short"
