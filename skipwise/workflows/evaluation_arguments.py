"""What the command line of `skipwise evaluate` asks for."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from skipwise.config.files import parse_written, read_yaml
from skipwise.errors import UserError, nearest
from skipwise.evaluation.passkey import Passkey
from skipwise.evaluation.perplexity import Perplexity
from skipwise.evaluation.results import Stage
from skipwise.evaluation.specs import EVALUATIONS, EvaluationSpec
from skipwise.evaluation.training_free import TrainingFree, split_training_free
from skipwise.lengths import parse_length
from skipwise.models.locate import model_location
from skipwise.runs.directory import RunDir
from skipwise.utils.sections import name_of
from skipwise.utils.settings import expand_name

NAMES = tuple(name_of(cls) for cls in EVALUATIONS)


@dataclass(frozen=True)
class ModelArgument:
    """One of the models that are compared.

    Attributes:
        name: as the user wrote it; it stands in the rows.
        path: where the model is; for a run directory the model in it.
        stage: `extended` for the model of a run, else `original`.
        short: for headings and file names.
        revision: of a hub model.
        training-free method: how it reads beyond its window.
    """

    name: str
    path: str
    stage: Stage
    short: str
    revision: str | None = None
    training_free: TrainingFree | None = None

    @property
    def place(self) -> Path:
        """Where the user said that it is, a run directory or a model."""
        return Path(split_training_free(self.name)[0])


def find_models(names: Sequence[str]) -> list[ModelArgument]:
    """What the arguments of the command stand for.

    Raises:
        UserError: for a path that leads to no model, a run that has none yet, or two with one name.
    """
    found = [_find(name) for name in names]
    shorts = [one.short for one in found]
    again = next((short for short in shorts if shorts.count(short) > 1), None)
    if again is not None:
        raise UserError(
            f"Every model needs a name of its own, but two are called {again!r}. Rename one directory.",
            code="duplicate_model_name",
        )
    return found


def _find(given: str) -> ModelArgument:
    name, training_free = split_training_free(given)
    found = _find_plain(name)
    if training_free is None:
        return found
    suffix = training_free.name if training_free.number is None else f"{training_free.name}-{training_free.number}"
    return replace(found, name=given, short=f"{found.short}-{suffix}", training_free=training_free)


def _find_plain(name: str) -> ModelArgument:
    run = RunDir(Path(name))
    last = Path(name.rpartition(":")[2]).name.removesuffix(".gguf")
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip(".") or "model"
    if run.models.is_file():
        raise UserError(
            f"{name} is an evaluation, not a model. Name the models that it measured.", code="evaluation_not_model"
        )
    if not run.resolved.is_file():
        within_run = RunDir(Path(name).parent).resolved.is_file() and Path(name).name == run.model.name
        model_location(name)
        return ModelArgument(name, name, "extended" if within_run else "original", short)
    if not (run.model / "config.json").is_file():
        raise UserError(
            f"{name} is a run that has written no model yet. Finish it with --resume, or name a model.",
            code="run_not_finished",
        )
    return ModelArgument(name, str(run.model), "extended", short)


def default_output(models: Sequence[ModelArgument]) -> Path:
    """Inside a run that is evaluated alone; else in `runs`, named after the models."""
    first = models[0].place
    if len(models) == 1 and RunDir(first).resolved.is_file():
        return first / "evaluation"
    return Path("runs") / f"evaluate-{'-'.join(one.short for one in models)}"


def values_of_run(models: Sequence[ModelArgument]) -> dict[str, Any]:
    """What the first run among the models was evaluated with, as values of an `EvaluateConfig`; {} without a run."""
    for one in models:
        run = RunDir(one.place)
        if run.resolved.is_file():
            config = parse_written(read_yaml(run.resolved))
            kept = {"sources", "held_out_share", "short_documents", "max_malformed_share"}
            return {
                "data": config.data.model_dump(mode="json", include=kept),
                "evaluate": [asdict(spec) for spec in config.evaluate or ()] or None,
                "seed": config.seed,
                "dtype": config.model.dtype,
                "attn_implementation": config.model.attn_implementation,
            }
    return {}


def select_evaluations(
    values: object, only: Sequence[str], lengths: Sequence[str], settings: Sequence[tuple[str, str, Any]]
) -> object:
    """The evaluations of a configuration, narrowed and changed by flags.

    Args:
        values: of the configuration; None for the default ones. What is no list of named evaluations stays as it is,
            for the configuration to refuse.
        only: keep these; one that the configuration lacks is added.
        lengths: in place of all context lengths.
        settings: (evaluation, key, value) changes.

    Raises:
        UserError: for an evaluation that does not exist, or a flag that changes nothing.
    """
    for name in only:
        if name not in NAMES:
            raise UserError(
                f"--only takes an evaluation, not {name!r}.{nearest(name, NAMES)}", code="unknown_evaluation"
            )
    if values is None and not only:
        if lengths or settings:
            raise UserError(
                "Name the evaluations that --lengths or --set is for, with --only or in a --config.",
                code="evaluations_not_named",
            )
        return None
    named = [expand_name(value) for value in values] if isinstance(values, list | tuple) else values or []
    if not isinstance(named, list) or not all(isinstance(value, Mapping) and "name" in value for value in named):
        return values
    kept = [dict(value) for value in named if not only or value["name"] in only]
    kept += [{"name": name} for name in only if name not in {value["name"] for value in kept}]
    if lengths:
        kept = _with_lengths(kept, lengths)
    for name, key, value in settings:
        changed = [own for own in kept if own["name"] == name]
        if not changed:
            raise UserError(
                f"--set {name}.{key} changes nothing, since {name} is not evaluated. Add --only {name}.",
                code="setting_without_effect",
            )
        for own in changed:
            own[key] = value
    return kept


def _with_lengths(kept: list[dict[str, Any]], lengths: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluations at these lengths; each length with the settings it has already, or else the first ones."""
    wanted = [parse_length(length) for length in lengths]
    result: list[dict[str, Any]] = []
    for name in dict.fromkeys(value["name"] for value in kept):
        own = [value for value in kept if value["name"] == name]
        known = [{parse_length(length) for length in value.get("context_lengths") or ()} for value in own]
        place = [next((i for i, has in enumerate(known) if length in has), 0) for length in wanted]
        if name == "harness":
            result += own
            continue
        for i, value in enumerate(own):
            mine = [length for length, at in zip(wanted, place, strict=True) if at == i]
            result += [{**value, "context_lengths": mine}] if mine else []
    return result


def as_given(values: Mapping[str, Any]) -> str:
    """The values of a configuration as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)


# A passkey prompt without filler has some ninety tokens.
SHORTEST_PASSKEY = 128


def default_evaluations(window: int) -> tuple[EvaluationSpec, ...]:
    """Perplexity and passkey at a quarter, half and all of a window."""
    lengths = tuple(sorted({max(2, window // 4), max(2, window // 2), max(2, window)}))
    final = max(1, min(1024, window // 8))
    room_for_a_key = tuple(length for length in lengths if length >= SHORTEST_PASSKEY) or lengths[-1:]
    return (
        Perplexity(context_lengths=lengths, stride=max(1, final // 2), documents=8, final_tokens=final),
        Passkey(context_lengths=room_for_a_key, trials=20),
    )
