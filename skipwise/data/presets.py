"""Texts that papers on long contexts evaluate on, by a short name."""

from typing import Any

from skipwise.errors import UserError, nearest

PREFIX = "preset:"
# The files the PoSE authors evaluated on (GovReport through SCROLLS, Proof-pile, PG-19), as they published them.
_AUTHORS = {"source": "dwzhu/PoSE-Datasets", "split": "train"}  # a single file is a split of this name
PRESETS: dict[str, dict[str, Any]] = {
    "gov-report": {**_AUTHORS, "data_files": "scrolls/gov_report/test_long.jsonl", "text_field": "input"},
    "proof-pile": {**_AUTHORS, "data_files": "proof-pile/test.jsonl"},
    "pg19": {**_AUTHORS, "data_files": "pile/test_pg19.jsonl"},
}


def expand_preset(source: dict[str, Any]) -> dict[str, Any]:
    """A source with its preset written out; any other as it is. What is given beside the preset wins.

    Raises:
        UserError: for a preset that does not exist.
    """
    name = source.get("source")
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return source
    name = name.removeprefix(PREFIX)
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}.{nearest(name, PRESETS)}", code="unknown_preset")
    return PRESETS[name] | {key: value for key, value in source.items() if key != "source"}
