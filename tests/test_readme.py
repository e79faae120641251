"""What the README shows must run, and its results must be those of the results."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.parametrize(
    ("page", "run"),
    [
        ("README.md", "demo"),
        ("docs/extend.md", "smollm2-32k"),
        ("docs/decisions.md", "demo"),
        ("docs/decisions.md", "smollm2-32k"),
        ("docs/evaluation.md", "smollm2-evaluation"),
    ],
)
def test_tables_are_those_of_the_results(page: str, run: str) -> None:
    table = (ROOT / "docs/results" / run / "table.md").read_text(encoding="utf-8")
    assert table in (ROOT / page).read_text(encoding="utf-8")


def test_the_training_loop_of_the_readme(pico_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a picomodel with lengths to fit; at most 15 lines, as promised."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(pico_directory))
    code = code.replace("original=8192, train=2048, target=32768", "original=64, train=32, target=512")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dataset": [{"input_ids": list(range(2, 42))}] * 4}
    exec(code, names)
    assert names["model"].config.max_position_embeddings == 512


def test_the_encoder_of_the_page_learns(tmp_path: Path) -> None:
    """docs/models.md, on a small model with lengths to fit."""
    from tests.picomodels import encoder_tokenizer, pico_encoder

    torch.manual_seed(0)  # of a skip, which may be none
    pico_encoder("modernbert").save_pretrained(tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("answerdotai/ModernBERT-base", str(tmp_path))
    code = code.replace("original=8192, train=2048, target=32768", "original=64, train=32, target=512")
    names: dict[str, Any] = {"dataset": [{"input_ids": list(range(4, 68))}]}
    exec(code, names)
    assert names["batch"]["position_ids"].max() >= 32
    names["loss"].backward()
    assert all(weight.grad is not None for weight in names["model"].parameters())


def test_the_encoder_decoder_of_the_page_reads() -> None:
    """docs/models.md, with skips in both texts."""
    from skipwise import Lengths, PoSE, WindowCollator, masks_for
    from tests.picomodels import t5gemma

    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(encoding="utf-8"), re.DOTALL)
    collator = WindowCollator(PoSE(), Lengths(original=64, train=32, target=512))
    batch, answers = (collator([{"input_ids": range(4, 36), "visit": (0, number, 0)}]) for number in (0, 1))
    names: dict[str, Any] = {"model": t5gemma(), "masks_for": masks_for, "batch": batch, "answers": answers}
    exec(code, names)
    assert names["logits"].shape[:2] == (1, 32)


def test_the_sampler_of_the_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/add-a-sampler.md, as it stands there."""
    from skipwise import Lengths

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-sampler.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert "distance 1,000 is in" in capsys.readouterr().out
    found = names["found"]
    lengths = Lengths(original=256, train=256, target=2048)
    # By hand: distance 1,000 is met by skips from 1,000 - 255 to 1,000 - 1, of 1,793.
    assert found.seen[1000] == pytest.approx(255 / (lengths.target - lengths.train + 1), abs=0.05)
