"""The table of every model type: complete, nothing in it crashed, and what a quick part of it finds is what it says.

All types, each in a process of its own, are `make -f experiments/Makefile support`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import type_sweep as sweep
from experiments.type_sweep import CRASHED, REFUSED, WORKS, outcome_apart, outcome_of, types_markdown
from tests import picotypes
from tests.picotypes import CAUSAL_TYPES

DOCS = Path(__file__).parents[2] / "docs"
COMMITTED: list[dict[str, Any]] = json.loads((DOCS / "results/support.json").read_text())["model_types"]
# One of each kind: plain, experts in one dtype, two tables, a table newer than the older form, longrope alone, an
# output layer called decoder, several models in one; and refused: several text models, learned positions, none, linear
# attention, an encoder, a scaling of all attention, a type that transformers builds nothing from.
QUICK = (
    "llama", "dbrx", "gemma3_text", "mellum", "phi4_multimodal", "modernbert-decoder", "gemma3", "blt", "gpt2", "mamba",
    "qwen3_next", "bert", "ministral3", "musicgen",
)  # fmt: skip


def test_every_type_has_a_row_and_works_or_is_refused_at_once() -> None:
    assert [row["model_type"] for row in COMMITTED] == list(CAUSAL_TYPES)
    for row in COMMITTED:
        assert row["outcome"] in (WORKS, REFUSED), row
        assert row["outcome"] == WORKS or (row["at"] == "plan" and row["code"] and row["reason"]), row


@pytest.mark.parametrize("kind", QUICK)
def test_what_becomes_of_a_type_is_what_the_table_says(kind: str) -> None:
    assert outcome_of(kind).as_dict() == next(row for row in COMMITTED if row["model_type"] == kind)


def test_a_model_that_is_not_small_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picotypes, "MOST_PARAMETERS", 10_000)
    with pytest.raises(AssertionError, match="llama has"):
        picotypes.small_model("llama")


def test_a_type_that_dies_or_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "outcome_of", lambda kind: os._exit(9))
    assert outcome_apart("llama").reason == "the process ended with 9"
    monkeypatch.setattr(sweep, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(sweep, "outcome_of", lambda kind: time.sleep(60))
    outcome = outcome_apart("llama")
    assert outcome.outcome == CRASHED and outcome.reason == "takes longer than 0.2 seconds"


def test_the_page_shows_the_table() -> None:
    page, outcomes = (DOCS / "models.md").read_text(), [row["outcome"] for row in COMMITTED]
    assert types_markdown(COMMITTED) in page
    assert f"{outcomes.count(WORKS)} work and {outcomes.count(REFUSED)} are refused" in page
