"""The examples run as they stand, on a small model and for fewer steps, and train with skips."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from skipwise.models.locate import model_location

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_trains_with_skips_and_writes_a_model(
    example: Path, tmp_path: Path, largest_positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if example.stem == "sft":
        pytest.importorskip("trl")
    book, output, code = tmp_path / "book.txt", tmp_path / "out", tmp_path / "example.py"
    book.write_text("It was a fine day, and number 12 of the list was done. " * 60)
    code.write_text(example.read_text().replace("max_steps=100", "max_steps=2"))
    monkeypatch.setattr(sys, "argv", [str(code), str(model_location("builtin:tiny")), str(book), str(output)])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(code), run_name="__main__")
    assert max(largest_positions) > 256  # beyond the original window, from windows of 64 tokens
    trained = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny"))
    assert trained.config.max_position_embeddings == 1024
    assert not torch.equal(trained.lm_head.weight.float(), before.lm_head.weight.float())
