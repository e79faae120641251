"""What cells a study file makes, and what it must not say."""

from pathlib import Path
from typing import Any

import pytest

from skipwise import UserError
from skipwise.evaluation.training_free import TrainingFree
from skipwise.study.config import development_cells, final_cells, parse_study
from tests.study.cells import PERPLEXITY, write


def test_every_combination_is_a_cell_once(tmp_path: Path) -> None:
    study = parse_study(write(tmp_path))
    final = list(final_cells(study, {}))
    names = [cell.name for cell in final]
    assert len(set(names)) == len(names)
    expected = {"untouched", "interpolate-yarn", "interpolate-linear"}
    for scaling in ("yarn", "linear"):
        for seed in (1, 2):
            expected |= {f"{method}-{scaling}-seed{seed}" for method in ("pose", "three")}
            expected |= {f"full-{scaling}-{budget}-seed{seed}" for budget in ("steps", "tokens")}
    assert set(names) == expected
    development = [cell.name for cell in development_cells(study)]
    assert len(development) == 2 * 4 * 2  # rates, trained methods and budgets, scalings
    assert "development-full-yarn-tokens-rate0.002-seed0" in development
    assert all(set(cell.domains) == {"books"} for cell in final)
    assert all(set(cell.domains) == {"dev"} for cell in development_cells(study))


def test_aids_and_untrained_scalings_are_methods(tmp_path: Path) -> None:
    methods = {"grouped": "untouched+self-extend:16", "linear": {"train": {"max_steps": 0}, "rope": "linear"}}
    study = parse_study(write(tmp_path, methods=methods, scalings=None))
    cells = {cell.name: cell for cell in final_cells(study, {})}
    assert cells["grouped"].training_free == TrainingFree("self-extend", 16) and cells["grouped"].run is None
    assert cells["untouched"].training_free is None
    untrained = cells["linear"].run
    assert untrained is not None and untrained.rope.name == "linear" and cells["linear"].kind == "interpolate"
    assert "development-linear" not in " ".join(cell.name for cell in development_cells(study))


def test_what_is_in_a_cell(tmp_path: Path) -> None:
    study = parse_study(write(tmp_path))
    rates: Any = {("full", "yarn", "tokens"): 0.5, ("three", "linear", None): 0.25}
    cells = {cell.name: cell for cell in final_cells(study, rates)}
    starved = cells["full-yarn-tokens-seed2"].run
    assert starved is not None
    # A window of 1,024 tokens instead of 256: a quarter of the steps for as many tokens.
    assert (starved.train.max_steps, starved.train.warmup_steps, starved.train.learning_rate) == (10, 2, 0.5)
    assert (starved.seed, starved.rope.name, starved.method) == (2, "yarn", "full")
    three = cells["three-linear-seed1"].run
    assert three is not None
    assert (three.positions.chunks, three.train.echo_share, three.rope.name) == (3, 0.5, "linear")  # type: ignore[union-attr]
    assert (three.train.max_steps, three.train.learning_rate) == (40, 0.25)
    assert (three.stages, three.evaluate) == ((), ())
    assert cells["untouched"].run is None
    untrained = cells["interpolate-linear"].run
    assert untrained is not None and untrained.train.max_steps == 0
    kinds = {cell.method: cell.kind for cell in cells.values()}
    assert kinds == {name: name for name in ("untouched", "interpolate", "full", "pose")} | {"three": "pose"}


def test_longer_windows_and_larger_batches_have_budgets_of_their_own(tmp_path: Path) -> None:
    methods = {"wide": {"lengths": {"train": 512}}, "many": {"train": {"per_device_train_batch_size": 16}}}
    study = parse_study(write(tmp_path, scalings=None, methods=methods))
    cells = {cell.name: cell.run for cell in final_cells(study, {})}
    for method, steps in (("wide", 20), ("many", 10)):
        equal_steps, equal_tokens = cells[f"{method}-steps-seed1"], cells[f"{method}-tokens-seed1"]
        assert equal_steps is not None and equal_tokens is not None
        assert (equal_steps.train.max_steps, equal_tokens.train.max_steps) == (40, steps)
    assert "pose-seed1" in cells


def test_without_development_nothing_is_tuned(tmp_path: Path) -> None:
    study = parse_study(write(tmp_path, development=None))
    assert list(development_cells(study)) == []
    assert set(next(final_cells(study, {})).domains) == {"dev", "books"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "posé"}, "no method is called 'posé'"),
        ({"methods": {"bad": {"train": {"max_step": 3}}}}, r"methods.bad: .*Did you mean 'max_steps'"),
        ({"methods": {"bad": "pse"}}, "methods.bad: must be untouched or a known method, not 'pse'.*mean 'pose'"),
        ({"base": {"lengths": {"target": 128}}}, "target must be above"),
        ({"base": {"seed": 3}}, "base: seed is set by the study"),
        ({"development": {"seeds": [2]}}, "seeds and development.seeds must differ"),
        ({"development": {"domains": ["none"]}}, "no domain is called 'none'"),
        ({"domains": {"books": {"evaluate": []}}}, "domains.books: says not what to measure"),
        (
            {"methods": {"Pose": {"train": {"weight_decay": 0.5}}}},
            "two are called 'development-pose-linear-rate0.001-seed0'",
        ),
        ({"seeds": [1, 1]}, "two are called .* or leave out a seed or rate that is there twice"),
        ({"methods": {"bad": {"rope": "ntk"}}}, "methods.bad: rope is the same for all"),
        ({"methods": {"bad": {"train": {"max_steps": 3}}}}, "methods.bad: train.max_steps is the same for all"),
        ({"methods": {"bad": {"lengths": {"target": 512}}}}, "methods.bad: lengths.target is the same"),
        ({"base": {"train": {"max_steps": 1, "per_device_train_batch_size": 1}}}, "more tokens than all of the budget"),
        ({"domains": {"books": {"evaluate": ["harness"]}}}, "domains.books: harness has no context length"),
        ({"domains": {"a book": {"data": "x", "evaluate": [PERPLEXITY]}}}, "not 'a book'"),
        ({"domains": {"books": None}}, "nothing is reported. Add another domain"),
        (
            {"domains": {"dev": {"data": {"held_out_share": 1.0}}}},
            "builtin:python is trained on.*held_out_share to 0.05",
        ),
        ({"development": {"evaluation": "passkey"}}, "passkey at 1,024 tokens decides"),
        ({"development": {"context_length": "2k"}}, "perplexity at 2,048 tokens decides"),
        ({"seeds": []}, "seeds"),
        ({"equal": ["hours"]}, "equal"),
        ({"method": {}}, "Did you mean 'methods'"),
    ],
)
def test_wrong_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        parse_study(write(tmp_path, **changes))
