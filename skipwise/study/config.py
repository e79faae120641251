"""A study file: methods, scalings and seeds over one model and one set of data, and the cells they make."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, Strict, model_validator

from skipwise.config import EvaluateConfig, Number, RunConfig, Section, method_overrides
from skipwise.config_files import merge, parse_config, parse_section, read_yaml
from skipwise.digests import short_digest
from skipwise.errors import UserError, nearest
from skipwise.lengths import Lengths
from skipwise.models.shape import read_config, read_windows
from skipwise.planning import resolve_target, window_tokens

UNTOUCHED = "untouched"
Budget = Literal["steps", "tokens"]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]


class Development(Section):
    """How the learning rate of each method is chosen, before the seeds that are reported.

    Attributes:
        learning_rates: the grid, the same for all methods.
        seeds: of training, apart from those that are reported.
        domain: what the models are measured on; its documents should not be among those that are reported.
        evaluation, context_length: the figure that decides; the lowest loss or the highest score wins. None is the
            target length.
    """

    learning_rates: Annotated[tuple[Annotated[Number, Field(gt=0.0)], ...], Strict(False), Field(min_length=1)]
    seeds: Seeds = (0,)
    domain: str
    evaluation: str = "perplexity"
    context_length: int | None = None


class StudyConfig(Section):
    """A grid of extensions.

    Attributes:
        base: what all runs share: a run configuration, without `evaluate`, `stages` and `seed`.
        methods: by name, what is different: a mapping that goes over `base`, the name of a method, or `untouched` for
            the model as it is.
        scalings: by name, RoPE scalings; empty for that of `base` alone.
        reference: the method that others are compared with.
        seeds: of training.
        equal: training budgets: as many `steps` as `base` has, and as many `tokens`. They differ for methods with
            longer windows, which are then trained both ways.
        development: how learning rates are chosen; None keeps those of `base` and `methods`.
        domains: by name, what every model is measured on.
        keep_models: whether models stay when their figures are there.
    """

    base: dict[str, Any]
    methods: Annotated[dict[str, str | dict[str, Any]], Field(min_length=1)]
    scalings: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    reference: str = "pose"
    seeds: Seeds = (1, 2, 3)
    equal: Annotated[tuple[Budget, ...], Strict(False), Field(min_length=1)] = ("steps", "tokens")
    development: Development | None = None
    domains: Annotated[dict[str, EvaluateConfig], Field(min_length=1)]
    keep_models: bool = False

    @model_validator(mode="after")
    def _names_exist(self) -> "StudyConfig":
        if self.reference not in self.methods:
            raise UserError(
                f"reference: no method is called {self.reference!r}.{nearest(self.reference, self.methods)}"
            )
        for key in ("evaluate", "stages", "seed"):
            if key in self.base:
                raise UserError(f"base: {key} is set by the study, for all runs. Leave it out.")
        for name, domain in self.domains.items():
            if not domain.evaluate:
                raise UserError(f"domains.{name}: says not what to measure. Give it evaluate.")
        if self.development is not None:
            if self.development.domain not in self.domains:
                name = self.development.domain
                raise UserError(f"development: no domain is called {name!r}.{nearest(name, self.domains)}")
            if set(self.seeds) & set(self.development.seeds):
                raise UserError(f"seeds and development.seeds must differ, but both have {list(self.seeds)}.")
        return self


@dataclass(frozen=True)
class Cell:
    """One model of a study: how it is made and what it is measured on.

    Attributes:
        name: of its directory.
        method, scaling, budget: as in the study; None where it makes no difference.
        seed: of training; None where nothing is trained.
        learning_rate: that was tried; None outside of development.
        run: the whole configuration of its training; None for the untouched model.
        domains: what it is measured on.
    """

    name: str
    method: str
    scaling: str | None
    budget: Budget | None
    seed: int | None
    learning_rate: float | None
    run: RunConfig | None
    domains: Mapping[str, EvaluateConfig]

    @property
    def digest(self) -> str:
        """Of all that its figures depend on."""
        run = None if self.run is None else self.run.model_dump(mode="json")
        domains = {name: domain.model_dump(mode="json") for name, domain in self.domains.items()}
        return short_digest(json.dumps([run, domains], sort_keys=True))


def parse_study(path: Path) -> StudyConfig:
    """Read and check a study file, all of its runs included.

    Raises:
        UserError: one message that says what is wrong.
    """
    study = parse_section(StudyConfig, read_yaml(path))
    names = [cell.name for cell in (*development_cells(study), *final_cells(study, {}))]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(f"Every cell needs a name of its own, but two are called {again!r}. Rename a method.")
    return study


def lengths_of(study: StudyConfig) -> Lengths:
    """The three lengths that all runs share."""
    config = _run(study, "base", {}, None)
    return resolve_target(config, *read_windows(read_config(config.model.path, config.model.revision)))


# What decides a learning rate: method, scaling and budget.
Choice = tuple[str, str | None, Budget | None]


def development_cells(study: StudyConfig) -> Iterator[Cell]:
    """Every learning rate of the grid for every method that trains."""
    if study.development is None:
        return
    domain = {study.development.domain: study.domains[study.development.domain]}
    for method, scaling, budget in _choices(study):
        if _trains(study, method, scaling):
            for rate in study.development.learning_rates:
                for seed in study.development.seeds:
                    yield _cell(study, (method, scaling, budget), seed, rate, domain, development=True)


def final_cells(study: StudyConfig, rates: Mapping[Choice, float]) -> Iterator[Cell]:
    """The models that are reported.

    Args:
        rates: chosen learning rates; a method that is not among them keeps its own.
    """
    reported = {
        name: domain
        for name, domain in study.domains.items()
        if study.development is None or name != study.development.domain
    }
    choices = {choice: _trains(study, choice[0], choice[1]) for choice in _choices(study)}
    # Seed after seed, so that a study that is not finished has something of every method.
    for number, seed in enumerate(study.seeds):
        for choice, trained in choices.items():
            if trained or number == 0:
                own = seed if trained else None
                yield _cell(study, choice, own, rates.get(choice), reported, development=False)


def _choices(study: StudyConfig) -> Iterator[Choice]:
    for method, given in study.methods.items():
        if given == UNTOUCHED:
            yield method, None, None
            continue
        for scaling in study.scalings or (None,):
            for budget in _budgets(study, method, scaling):
                yield method, scaling, budget


def _budgets(study: StudyConfig, method: str, scaling: str | None) -> tuple[Budget | None, ...]:
    """None where as many steps are as many tokens."""
    config = _run(study, method, *_overrides(study, method, scaling))
    lengths = lengths_of(study)
    if config.method == "interpolate" or window_tokens(config.method, lengths) == lengths.train:
        return (None,)
    return study.equal


def _trains(study: StudyConfig, method: str, scaling: str | None) -> bool:
    if study.methods[method] == UNTOUCHED:
        return False
    return _run(study, method, *_overrides(study, method, scaling)).method != "interpolate"


def _cell(
    study: StudyConfig,
    choice: Choice,
    seed: int | None,
    rate: float | None,
    domains: Mapping[str, EvaluateConfig],
    development: bool,
) -> Cell:
    method, scaling, budget = choice
    parts = ["development" if development else None, method, scaling, budget]
    parts += [f"rate{rate:g}" if development else None, None if seed is None else f"seed{seed}"]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(part for part in parts if part)).lower()
    if study.methods[method] == UNTOUCHED:
        return Cell(name, method, None, None, None, None, None, domains)
    values, rope = _overrides(study, method, scaling)
    config = _run(study, method, values, rope)
    train = {"learning_rate": rate} if rate is not None else {}
    if budget == "tokens":
        lengths = lengths_of(study)
        share = lengths.train / window_tokens(config.method, lengths)
        train["max_steps"] = max(1, round(config.train.max_steps * share))
        train["warmup_steps"] = round(config.train.warmup_steps * share)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "seed": seed or 0,
            "stages": (),
            "evaluate": (),
        }
    )
    return Cell(name, method, scaling, budget, seed, rate if development else None, config, domains)


def _overrides(study: StudyConfig, method: str, scaling: str | None) -> tuple[dict[str, Any], Any]:
    """What a method and a scaling put over the base."""
    given = study.methods[method]
    values = method_overrides(given) if isinstance(given, str) else given
    return values, None if scaling is None else study.scalings[scaling]


def _run(study: StudyConfig, name: str, values: Mapping[str, Any], rope: Any) -> RunConfig:
    try:
        merged = merge(study.base, values)
        return parse_config(merged if rope is None else {**merged, "rope": rope})
    except UserError as error:
        raise UserError(f"{'base' if name == 'base' else f'methods.{name}'}: {error}") from error


def cell_yaml(cell: Cell) -> str:
    """The run configuration of a cell, as YAML."""
    assert cell.run is not None
    return yaml.safe_dump(json.loads(cell.run.model_dump_json()), sort_keys=False)
