"""Results of a study from made-up cells, against sums by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipwise import UserError
from skipwise.evaluation.statistics import paired_shares
from skipwise.report.page import write_picture
from skipwise.report.study import study_markdown, write_study_page
from skipwise.study.cell import Finished
from skipwise.study.config import (
    Cell,
    Development,
    StudyConfig,
    development_cells,
    final_cells,
    lengths_of,
    parse_study,
)
from skipwise.study.summary import choose_rates, mean_losses, summarise
from tests.study.cells import write

TOKENS = [64, 64, 32]
# Mean loss per token of each arm at 1,024 tokens, and what a seed adds.
LOSS = {"untouched": 3.0, "interpolate": 2.5, "full": 2.0, "pose": 2.1, "three": 2.05}
BY_SEED = {None: 0.0, 1: 0.01, 2: -0.01}
# What documents and seeds add to the difference of one method from the others.
OWN = {"three": ((0.02, -0.02, 0.0), 0.5), "full": ((0.001, -0.001, 0.0), 0.05)}


def finished(cell: Cell, extra: float = 0.0) -> Finished:
    """Losses that differ by document, and keys that the better models find."""
    method, seed = cell.method, cell.seed
    by_document, by_seed = OWN.get(method, ((0.0, 0.0, 0.0), 0.0))
    loss = LOSS[method] + BY_SEED.get(seed, 0.0) * (1 + by_seed) + extra
    shifts = [shift + own for shift, own in zip((0.3, -0.3, 0.0), by_document, strict=True)]
    nll = [tokens * (loss + shift) for tokens, shift in zip(TOKENS, shifts, strict=True)]
    contributions = {
        "perplexity/256": {"example": ["0:1", "0:2", "0:3"], "nll": [0.5 * x for x in nll], "tokens": TOKENS},
        "perplexity/1024": {"example": ["0:1", "0:2", "0:3"], "nll": nll, "tokens": TOKENS},
        "passkey/1024": {"example": ["0", "1"], "score": [1, int(LOSS[method] < 2.3)]},
    }
    losses = [(1, 4.0 + BY_SEED.get(seed, 0.0)), (10, 3.0)] if seed is not None else []
    return Finished(dict.fromkeys(cell.domains, contributions), losses, {}, {})


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return parse_study(write(tmp_path, scalings=None))


@pytest.fixture
def summary(study: StudyConfig) -> dict[str, Any]:
    cells = [(cell, finished(cell)) for cell in final_cells(study, {})]
    return summarise(study, lengths_of(study), cells, [])


def result(summary: dict[str, Any], method: str, evaluation: str, length: int, budget: str | None = None) -> Any:
    (row,) = [
        row
        for row in summary["figures"]
        if (row["method"], row["evaluation"], row["context_length"], row["budget"])
        == (method, evaluation, length, budget)
    ]
    return row


def test_values_are_sums_over_sums_of_all_seeds(summary: dict[str, Any]) -> None:
    row = result(summary, "pose", "perplexity", 1024)
    nll = sum(t * (2.1 + s) for t, s in zip(TOKENS, (0.3, -0.3, 0.0), strict=True))
    assert row["value"] == pytest.approx(math.exp(nll / 160))
    assert row["interval"][0] < row["value"] < row["interval"][1]
    assert (row["seeds"], row["domain"]) == (2, "books")
    keys = result(summary, "interpolate", "passkey", 1024)
    assert keys["value"] == 0.5
    assert 0 <= keys["interval"][0] < 0.2 and 0.8 < keys["interval"][1] <= 1
    # Two of two are no certainty.
    assert result(summary, "pose", "passkey", 1024)["interval"][0] < 0.75


def test_ratios_are_paired(summary: dict[str, Any]) -> None:
    """Documents and seeds differ by far more than methods do, but mostly alike; only what is not alike counts.

    Of three and pose the seeds' differences are -0.045 and -0.055, and documents add 0.02 * 64, -0.02 * 64 and 0 nats,
    or 0.024, -0.024 and 0 beside their mean of 160 / 3 tokens: a standard error of sqrt(5e-5 / 2 + 5.76e-4 / 3), and
    one degree of freedom, where the t distribution is Cauchy's.
    """
    row = result(summary, "three", "perplexity", 1024)
    assert row["over_reference"]["value"] == pytest.approx(math.exp(-0.05))
    error = math.sqrt(5e-5 / 2 + 5.76e-4 / 3)
    half = math.tan(0.475 * math.pi) * error
    assert row["over_reference"]["interval"] == pytest.approx([math.exp(-0.05 - half), math.exp(-0.05 + half)])
    assert row["p_value"] == pytest.approx(1 - 2 * math.atan(0.05 / error) / math.pi)
    assert row["over_full"]["value"] == pytest.approx(math.exp(0.05))
    assert result(summary, "pose", "perplexity", 256)["original_window_ratio"]["value"] == pytest.approx(
        math.exp(0.5 * (2.1 - 3.0))
    )
    assert "original_window_ratio" not in row
    assert "over_reference" not in result(summary, "pose", "perplexity", 1024)
    assert "over_reference" not in result(summary, "untouched", "perplexity", 1024)
    assert "over_full" not in result(summary, "full", "perplexity", 1024, "steps")
    assert result(summary, "full", "perplexity", 1024, "tokens")["over_full"]["value"] == pytest.approx(1.0)
    # Two of two by both is no certainty that they are alike.
    equal = result(summary, "three", "passkey", 1024)
    assert (equal["over_reference"]["value"], equal["p_value"]) == (0.0, None)
    assert equal["over_reference"]["interval"] == list(paired_shares(0, 0, 2))


@pytest.mark.parametrize("reference", ["full", "untouched"])
def test_any_method_can_be_the_reference(reference: str, study: StudyConfig) -> None:
    other = study.model_copy(update={"reference": reference})
    cells = [(cell, finished(cell)) for cell in final_cells(other, {})]
    row = result(summarise(other, lengths_of(other), cells, []), "pose", "perplexity", 1024)
    assert row["over_reference"]["value"] == pytest.approx(math.exp(2.1 - LOSS[reference]))


def test_cells_measured_on_other_documents_are_refused(study: StudyConfig) -> None:
    cells = [(cell, replace(finished(cell), documents={"books": cell.method})) for cell in final_cells(study, {})]
    with pytest.raises(UserError, match="those of books were others for full-steps-seed1 than"):
        summarise(study, lengths_of(study), cells, [])


def test_p_values_are_corrected_within_an_evaluation_and_length(summary: dict[str, Any]) -> None:
    rows = [row for row in summary["figures"] if (row["evaluation"], row["context_length"]) == ("perplexity", 1024)]
    pairs = sorted((row["p_value"], row["p_value_holm"]) for row in rows if row.get("p_value") is not None)
    values = [value for value, _ in pairs]
    assert len(pairs) == 3 and 3 * values[0] < 1  # full twice, and three
    expected = [3 * values[0], max(3 * values[0], 2 * values[1]), max(3 * values[0], 2 * values[1], values[2])]
    assert [corrected for _, corrected in pairs] == pytest.approx([min(1.0, value) for value in expected])


def test_the_lowest_mean_loss_chooses_the_rate(study: StudyConfig) -> None:
    assert study.development is not None
    better = {"full": 0.001, "pose": 0.002, "three": 0.001}
    cells = [
        (cell, finished(cell, 0.0 if cell.learning_rate == better[cell.method] else 0.1))
        for cell in development_cells(study)
    ]
    rows = choose_rates(study.development, cells, 1024)
    assert {(row["method"], row["budget"]): row["learning_rate"] for row in rows} == {
        ("full", "steps"): 0.001,
        ("full", "tokens"): 0.001,
        ("pose", None): 0.002,
        ("three", None): 0.001,
    }
    assert all(row["at_edge"] for row in rows)
    cells[0][1].contributions["dev"].pop("perplexity/1024")  # a rate that failed is out
    assert choose_rates(study.development, cells, 1024)[0]["learning_rate"] != cells[0][0].learning_rate
    by_score = study.development.model_copy(update={"evaluation": "passkey"})
    assert [row["learning_rate"] for row in choose_rates(by_score, cells, 1024)] == [0.001] * 4


def test_every_domain_of_development_counts_alike(study: StudyConfig) -> None:
    """The lower rate is better by 0.1 in one and worse by 0.2 in the other, which has far fewer documents."""
    development = Development(learning_rates=(0.001, 0.002), domains=("dev", "proofs"))
    cells = []
    for cell in development_cells(study):
        if cell.method == "pose":
            lower = cell.learning_rate == 0.001
            short = {"example": ["0:9"], "nll": [2.2 if lower else 2.0], "tokens": [1]}
            own = finished(cell, 0.0 if lower else 0.1)
            cells.append(
                (cell, replace(own, contributions={**own.contributions, "proofs": {"perplexity/1024": short}}))
            )
    (row,) = choose_rates(development, cells, 1024)
    assert row["learning_rate"] == 0.002
    nll = sum(t * (2.2 + s) for t, s in zip(TOKENS, (0.3, -0.3, 0.0), strict=True)) / 160
    assert dict(row["tried"])[0.002] == pytest.approx(math.exp((nll + 2.0) / 2))


def test_tables_and_pictures_show_every_arm(summary: dict[str, Any], study: StudyConfig, tmp_path: Path) -> None:
    text = study_markdown(summary)
    for arm in ("untouched", "interpolate", "full, equal steps", "full, equal tokens", "pose", "three"):
        assert f"| {arm} |" in text
    assert "Seeds 1, 2. Brackets" in text
    half = summarise(study, lengths_of(study), [(c, finished(c)) for c in final_cells(study, {}) if c.seed != 2], [])
    assert "Seeds 1 of 1, 2: this study is not finished." in study_markdown(half)
    assert "| perplexity | books | 1k | three | 0.951 [0.789, 1.147] | 0.182 |" in text
    cells = [(cell, finished(cell)) for cell in final_cells(study, {})]
    losses = mean_losses(cells)
    assert losses["pose"] == [(1, pytest.approx(4.0)), (10, 3.0)]
    assert "untouched" not in losses
    charts = write_study_page(summary, losses, "skipwise study", "", [], tmp_path / "report.html")
    drawn = [chart.key for chart in charts if chart.spec is not None]
    assert drawn == ["perplexity", "passkey", "differences", "losses"]
    for key in drawn:
        (chart,) = [chart for chart in charts if chart.key == key]
        for number in range(2):
            write_picture(chart, tmp_path / f"{number}.svg")
        assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()
