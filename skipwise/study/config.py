"""A study file: methods, scalings and seeds over one model and one set of data, and the cells they make."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from skipwise.config.files import merge, parse_config, parse_section, read_yaml, without_removed
from skipwise.config.resolve import ResolvedRun, resolve
from skipwise.config.run import EvaluateConfig, RunConfig, method_overrides
from skipwise.errors import UserError, nearest
from skipwise.evaluation.harness import Harness
from skipwise.evaluation.training_free import TrainingFree, split_training_free
from skipwise.lengths import Lengths
from skipwise.models.config import ModelConfig
from skipwise.utils.settings import Length, Number, Section, Seed

if TYPE_CHECKING:
    from skipwise.export.inspection import ModelInfo

UNTOUCHED = "untouched"
Budget = Literal["steps", "tokens"]
Seeds = Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)]
# What the study sets for all runs, and what would make methods unequal without a word.
NOT_IN_BASE = ("evaluate", "stages", "seed")
NOT_IN_METHODS = (*NOT_IN_BASE, "model", "lengths.target", "lengths.original", "train.max_steps")
UNTRAINED = {"max_steps": 0}


class Development(Section):
    """How the learning rate of each method is chosen, before the seeds that are reported.

    Attributes:
        learning_rates: the grid, the same for all methods.
        seeds: of training, apart from those that are reported.
        domains: what the models are measured on, which is not reported; every one counts alike.
        evaluation, context_length: the result that decides; the lowest loss or the highest score wins. None is the
            target length.
    """

    learning_rates: Annotated[tuple[Annotated[Number, Field(gt=0.0)], ...], Strict(False), Field(min_length=1)]
    seeds: Seeds = (0,)
    domains: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
    evaluation: str = "perplexity"
    context_length: Length | None = None


class StudyConfig(Section):
    """A grid of extensions.

    Attributes:
        base: what all runs share: a run configuration, without `evaluate`, `stages` and `seed`.
        methods: by name, what is different: a mapping that goes over `base`, the name of a method, `untouched` for
            the model as it is, or `untouched+AID` for one that reads beyond its window with a training-free method.
        scalings: by name, RoPE scalings; empty for that of `base` (or of a method) alone.
        reference: the method that others are compared with.
        seeds: of training.
        equal: training budgets: as many `steps` as `base` has, and as many `tokens`. They differ for methods with
            more tokens in a step, which are then trained both ways.
        development: how learning rates are chosen; None keeps those of `base` and `methods`.
        domains: by name, what every model is measured on.
        keep_models: whether models stay when their results are there.
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
    def _nothing_is_set_twice(self) -> "StudyConfig":
        for key in NOT_IN_BASE:
            if key in self.base:
                raise UserError(
                    f"base: {key} is set by the study, for all runs. Leave it out.", code="key_set_by_study"
                )
        for name, values in self.methods.items():
            for key in (*NOT_IN_METHODS, *(["rope"] if self.scalings else [])):
                # No steps at all is the method `interpolate`, which may have a scaling of its own.
                untrained = key == "train.max_steps" and isinstance(values, dict) and values.get("train") == UNTRAINED
                if isinstance(values, dict) and _has(values, key) and not untrained:
                    raise UserError(
                        f"methods.{name}: {key} is the same for all methods of a study. Leave it out.",
                        code="key_same_for_methods",
                    )
        if self.reference not in self.methods:
            raise UserError(
                f"reference: no method is called {self.reference!r}.{nearest(self.reference, self.methods)}",
                code="unknown_reference",
            )
        return self

    @model_validator(mode="after")
    def _domains_can_be_reported(self) -> "StudyConfig":
        for name, domain in self.domains.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"domains: a name begins with a letter or digit and has only these and . _ -, not {name!r}. "
                    "Rename it.",
                    code="malformed_domain_name",
                )
            if not domain.evaluate:
                raise UserError(
                    f"domains.{name}: says not what to measure. Give it evaluate.", code="domain_without_evaluation"
                )
            if any(isinstance(spec, Harness) for spec in domain.evaluate):
                raise UserError(
                    f"domains.{name}: harness has no context length to be compared at. Leave it out, keep the models "
                    "(keep_models: true), and measure them with skipwise evaluate.",
                    code="harness_in_study",
                )
        return self

    @model_validator(mode="after")
    def _development_stands_apart(self) -> "StudyConfig":
        if self.development is None:
            return self
        for name in self.development.domains:
            if name not in self.domains:
                raise UserError(
                    f"development: no domain is called {name!r}.{nearest(name, self.domains)}", code="unknown_domain"
                )
        if set(self.domains) == set(self.development.domains):
            raise UserError(
                f"domains: {name} is for development, so nothing is reported. Add another domain.",
                code="no_reported_domain",
            )
        both = sorted(set(self.seeds) & set(self.development.seeds))
        if both:
            raise UserError(
                f"seeds and development.seeds must differ, but both have {both}. Change one of them.",
                code="seeds_overlap",
            )
        return self


def _has(values: Mapping[str, Any], key: str) -> bool:
    head, _, rest = key.partition(".")
    inner = values.get(head)
    return head in values and (not rest or (isinstance(inner, Mapping) and rest in inner))


@dataclass(frozen=True)
class Cell:
    """One model of a study: how it is made and what it is measured on.

    Attributes:
        name: of its files.
        method, scaling, budget: as in the study; None where it makes no difference.
        seed: of training; None where nothing is trained.
        learning_rate: that was tried; None outside of development.
        model: what it starts from.
        run: the whole configuration of its training; None for the untouched model.
        domains: what it is measured on.
        training-free method: how the untouched model reads beyond its window.
    """

    name: str
    method: str
    scaling: str | None
    budget: Budget | None
    seed: int | None
    learning_rate: float | None
    model: ModelConfig
    run: RunConfig | None
    domains: Mapping[str, EvaluateConfig]
    training_free: TrainingFree | None = None

    @property
    def kind(self) -> str:
        """What is done, whatever the method is called in the study: `untouched`, `interpolate`, `full`, `pose`, ..."""
        return UNTOUCHED if self.run is None else self.run.method


def parse_study(path: Path, written: bool = False) -> StudyConfig:
    """Read and check a study file, all of its runs included.

    Args:
        path: study file.
        written: whether an earlier version may have run it; settings that it had are left out (`parse_written`).

    Raises:
        UserError: one message that says what is wrong.
    """
    values = read_yaml(path)
    study = parse_section(StudyConfig, without_removed(values) if written else values)
    cells = [*development_cells(study), *final_cells(study, {})]
    names = [cell.name for cell in cells]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise UserError(
            f"Every cell needs a name of its own, but two are called {again!r}. Rename a method, or leave out a seed "
            "or rate that is there twice.",
            code="duplicate_cell_name",
        )
    for cell in cells:
        _check_held_out(cell)
    _check_development_result(study)
    return study


def _check_held_out(cell: Cell) -> None:
    """Refuse to report on what was trained on."""
    if cell.run is None:
        return
    data = cell.run.data
    trained = {source.source for source in data.sources}
    for name, domain in cell.domains.items():
        both = sorted(trained & {source.source for source in domain.data.sources})
        if both and domain.data.held_out_share != data.held_out_share:
            raise UserError(
                f"domains.{name}: {', '.join(both)} is trained on, all but a share of {data.held_out_share}, and this "
                f"measures a share of {domain.data.held_out_share}. Set data.held_out_share to {data.held_out_share} "
                "there.",
                code="held_out_share_differs",
            )


def _check_development_result(study: StudyConfig) -> None:
    if study.development is None:
        return
    evaluation, length = deciding_result(study.development, lengths_of(study).target)
    for name in study.development.domains:
        specs = study.domains[name].evaluate or ()
        if not any(spec.name == evaluation and length in spec.context_lengths for spec in specs):
            raise UserError(
                f"development: {evaluation} at {length:,} tokens decides, but domains.{name} does not measure it. Add "
                "it there, or set development.evaluation and development.context_length.",
                code="development_not_measured",
            )


def deciding_result(development: Development, target: int) -> tuple[str, int]:
    """Evaluation and context length by which learning rates are chosen."""
    return development.evaluation, development.context_length or target


def lengths_of(study: StudyConfig) -> Lengths:
    """The three lengths of `base`."""
    return resolved(_run(study, "base", {}, None)).lengths


def resolved(config: RunConfig) -> ResolvedRun:
    """The settings of one run, with what depends on its model."""
    windows = inspected(config.model, config.lengths.original).windows
    return resolve(config, windows.original, windows.current)


@lru_cache
def inspected(model: ModelConfig, original: int | None = None) -> "ModelInfo":
    """What is known of the model of a study, read once."""
    from skipwise.export.inspection import inspect_model

    return inspect_model(model, original=original)


def tokens_of_step(config: RunConfig) -> int:
    """How many tokens a training step has."""
    windows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    return windows * resolved(config).window_length


# What decides a learning rate: method, scaling and budget.
Choice = tuple[str, str | None, Budget | None]


def development_cells(study: StudyConfig) -> Iterator[Cell]:
    """Every learning rate of the grid for every method that trains."""
    if study.development is None:
        return
    domains = {name: study.domains[name] for name in study.development.domains}
    for choice, trained in _choices(study).items():
        if trained:
            for rate in study.development.learning_rates:
                for seed in study.development.seeds:
                    yield _cell(study, choice, seed, rate, domains, development=True)


def final_cells(study: StudyConfig, rates: Mapping[Choice, float]) -> Iterator[Cell]:
    """The models that are reported.

    Args:
        rates: chosen learning rates; a method that is not among them keeps its own.
    """
    reported = {
        name: domain
        for name, domain in study.domains.items()
        if study.development is None or name not in study.development.domains
    }
    choices = _choices(study)
    # Seed after seed, so that a study that is not finished has something of every method.
    for number, seed in enumerate(study.seeds):
        for choice, trained in choices.items():
            if trained or number == 0:
                own = seed if trained else None
                yield _cell(study, choice, own, rates.get(choice), reported, development=False)


def _choices(study: StudyConfig) -> dict[Choice, bool]:
    """Every method with every scaling and budget that makes a difference, and whether it trains."""
    base = _run(study, "base", {}, None)
    choices: dict[Choice, bool] = {}
    for method, given in study.methods.items():
        if _is_untouched(given):
            choices[method, None, None] = False
            continue
        for scaling in study.scalings or (None,):
            config = _run(study, method, *_overrides(study, method, scaling))
            trained = config.trains
            same = not trained or tokens_of_step(config) == tokens_of_step(base)
            for budget in (None,) if same else study.equal:
                choices[method, scaling, budget] = trained
    return choices


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
    # The name of a directory, which must not lead out of the one it is in.
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(part for part in parts if part)).lower().lstrip(".") or "cell"
    base = _run(study, "base", {}, None)
    given = study.methods[method]
    if _is_untouched(given):
        return Cell(name, method, None, None, None, None, base.model, None, domains, split_training_free(str(given))[1])
    config = _run(study, method, *_overrides(study, method, scaling))
    train: dict[str, Any] = {"learning_rate": rate} if rate is not None else {}
    if budget == "tokens":
        share = tokens_of_step(base) / tokens_of_step(config)
        steps = round(base.train.max_steps * share)
        if steps < 1:
            raise UserError(
                f"methods.{method}: one step has more tokens than all of the budget. Raise train.max_steps of base, or "
                "leave 'tokens' out of equal.",
                code="budget_below_one_step",
            )
        train |= {"max_steps": steps, "warmup_steps": round(base.train.warmup_steps * share)}
    trained = config.train.model_copy(update=train)
    run = config.model_copy(update={"train": trained, "seed": seed or 0, "stages": (), "evaluate": ()})
    return Cell(name, method, scaling, budget, seed, rate if development else None, base.model, run, domains)


def _is_untouched(given: str | dict[str, Any]) -> bool:
    return isinstance(given, str) and split_training_free(given)[0] == UNTOUCHED


def _overrides(study: StudyConfig, method: str, scaling: str | None) -> tuple[dict[str, Any], Any]:
    """What a method and a scaling put over the base."""
    given = study.methods[method]
    if isinstance(given, str):
        try:
            given = method_overrides(given)
        except UserError as error:
            raise UserError(
                f"methods.{method}: {str(error).replace('--method must be', f'must be {UNTOUCHED} or')}",
                code=error.code,
            ) from error
    return given, None if scaling is None else study.scalings[scaling]


def _run(study: StudyConfig, name: str, values: Mapping[str, Any], rope: Any) -> RunConfig:
    try:
        merged = merge(study.base, values)
        return parse_config(merged if rope is None else {**merged, "rope": rope})
    except UserError as error:
        raise UserError(f"{'base' if name == 'base' else f'methods.{name}'}: {error}", code=error.code) from error
