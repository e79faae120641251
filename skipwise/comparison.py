"""`skipwise evaluate`: the same evaluations on one model or several, side by side; nothing is measured twice."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from skipwise.config import EvaluateConfig, ModelConfig
from skipwise.config_files import parse_config, read_yaml, to_yaml
from skipwise.data.sources import check_source
from skipwise.environment import describe_environment
from skipwise.errors import UserError, nearest
from skipwise.evaluation.figures import Example, Figure, difference
from skipwise.evaluation.specs import EVALUATIONS, EvalResult, EvaluationSpec, Passkey, Perplexity, Stage
from skipwise.models.locate import model_location
from skipwise.runs import RunDir, write_json, write_text
from skipwise.sections import name_of

if TYPE_CHECKING:
    from skipwise.data.held_out import HeldOut

NAMES = tuple(name_of(cls) for cls in EVALUATIONS)


@dataclass(frozen=True)
class Compared:
    """One of the models that are compared.

    Attributes:
        name: as the user wrote it; it stands in the rows.
        path: where the model is; for a run directory the model in it.
        stage: `extended` for the model of a run, else `original`.
        short: for headings and file names.
    """

    name: str
    path: str
    stage: Stage
    short: str


def find_models(names: Sequence[str]) -> list[Compared]:
    """What the arguments of the command stand for.

    Raises:
        UserError: for a path that leads to no model, a run that has none yet, or two with one name.
    """
    found = [_find(name) for name in names]
    shorts = [one.short for one in found]
    again = next((short for short in shorts if shorts.count(short) > 1), None)
    if again is not None:
        raise UserError(f"Every model needs a name of its own, but two are called {again!r}. Rename one directory.")
    return found


def _find(name: str) -> Compared:
    run = RunDir(Path(name))
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name.rpartition(":")[2]).name.removesuffix(".gguf")) or "model"
    if not run.resolved.is_file():
        within_run = RunDir(Path(name).parent).resolved.is_file() and Path(name).name == run.model.name
        model_location(name)
        return Compared(name, name, "extended" if within_run else "original", short)
    if not (run.model / "config.json").is_file():
        raise UserError(f"{name} is a run that has written no model yet. Finish it with --resume, or name a model.")
    return Compared(name, str(run.model), "extended", short)


def values_of_run(models: Sequence[Compared]) -> dict[str, Any]:
    """What the first run among the models was evaluated with, as values of an `EvaluateConfig`; {} without a run."""
    for one in models:
        run = RunDir(Path(one.name))
        if run.resolved.is_file():
            config = parse_config(read_yaml(run.resolved))
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
    values: Sequence[Mapping[str, Any]] | None,
    only: Sequence[str],
    lengths: Sequence[str],
    settings: Sequence[tuple[str, str, Any]],
) -> list[dict[str, Any]] | None:
    """The evaluations of a configuration, narrowed and changed by flags.

    Args:
        values: of the configuration; None for the default ones.
        only: keep these; one that the configuration lacks is added.
        lengths: in place of all context lengths.
        settings: (evaluation, key, value) changes.

    Returns:
        None where nothing is said and the default is to be chosen.

    Raises:
        UserError: for an evaluation that does not exist.
    """
    for name in only:
        if name not in NAMES:
            raise UserError(f"--only takes an evaluation, not {name!r}.{nearest(name, NAMES)}")
    if values is None and not only:
        if lengths or settings:
            raise UserError("Name the evaluations that --lengths or --set is for, with --only or in a --config.")
        return None
    kept = [dict(value) for value in values or () if not only or value.get("name") in only]
    kept += [{"name": name} for name in only if name not in {value.get("name") for value in kept}]
    if lengths:
        kept = [value if value["name"] == "harness" else {**value, "context_lengths": list(lengths)} for value in kept]
        # Several of one name would then be asked for the same lengths.
        kept = list({value["name"]: value for value in kept}.values())
    for name, key, value in settings:
        for own in kept:
            if own.get("name") == name:
                own[key] = value
    return kept


def default_evaluations(window: int) -> tuple[EvaluationSpec, ...]:
    """Perplexity and passkey at a quarter, half and all of a window."""
    lengths = tuple(sorted({max(2, window // 4), max(2, window // 2), max(2, window)}))
    final = max(1, min(1024, window // 8))
    return (
        Perplexity(context_lengths=lengths, stride=max(1, final // 2), documents=8, final_tokens=final),
        Passkey(context_lengths=lengths, trials=20),
    )


def default_output(models: Sequence[Compared]) -> Path:
    """Inside a run that is evaluated alone; else in `runs`, named after the models."""
    if len(models) == 1 and RunDir(Path(models[0].name)).resolved.is_file():
        return Path(models[0].name) / "evaluation"
    return Path("runs") / f"evaluate-{'-'.join(one.short for one in models)}"


def compare(
    models: Sequence[Compared], config: EvaluateConfig, output: Path, *, given: str, console: Console
) -> list[EvalResult]:
    """Measure every model, and keep rows and examples in `output`; what is there already is not measured again.

    Args:
        models: from `find_models`.
        config: what to measure.
        output: a directory of an earlier evaluation with the same settings, or a new one.
        given: the configuration as the user wrote it.
        console: where progress goes.

    Returns:
        The rows of these models and evaluations.

    Raises:
        UserError: for wrong input, before anything is written.
    """
    run = RunDir(output)
    for source in config.data.sources:
        check_source(source)

    from skipwise.models.load import load_config
    from skipwise.models.rope import read_window

    windows = {one.name: read_window(load_config(model_config(one, config))) for one in models}
    if config.evaluate is None:
        longest = max((window for window in windows.values() if window is not None), default=2048)
        config = config.model_copy(update={"evaluate": default_evaluations(longest)})
    resolved = to_yaml(_joined(run, config))
    identities = {one.name: identity(model_location(one.path)) for one in models}
    known = json.loads(run.models.read_text(encoding="utf-8")) if run.models.exists() else {}
    _check_same_models(run, known, identities)

    write_text(run.config, given)
    write_json(run.environment, describe_environment())
    write_json(run.models, known | identities)
    write_text(run.resolved, resolved)
    for one in models:
        _measure(run, one, windows[one.name], config, console)
    names = {one.name for one in models}
    asked = {(spec.name, length) for spec in config.evaluate or () for length in spec.context_lengths}
    return [
        row
        for row in run.read_results()
        if row.model in names and (row.evaluation.partition("/")[0], row.context_length) in asked
    ]


def model_config(one: Compared, config: EvaluateConfig) -> ModelConfig:
    """How a model is loaded."""
    return ModelConfig(
        path=one.path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def _joined(run: RunDir, config: EvaluateConfig) -> EvaluateConfig:
    """The configuration of an evaluation directory, with what is new.

    Raises:
        UserError: when a figure that it holds was to be measured in another way.
    """
    if not run.resolved.exists():
        if run.path.exists() and any(run.path.iterdir()) and not run.models.exists():
            raise UserError(f"{run.path} exists and is no evaluation. Choose another --output.")
        return config
    from skipwise.config_files import parse_evaluate_config

    if not run.models.exists():
        raise UserError(f"{run.path} is no evaluation but a run of its own. Choose another --output.")
    old = parse_evaluate_config(read_yaml(run.resolved))
    for section in ("data", "dtype", "attn_implementation", "chat", "seed"):
        if getattr(old, section) != getattr(config, section):
            raise UserError(
                f"{run.path} was evaluated with another {section} (see {run.resolved}). "
                "Use the same one, or choose another --output."
            )
    before = dict(_settings(old.evaluate or ()))
    for figure, settings in _settings(config.evaluate or ()):
        if before.get(figure, settings) != settings:
            name, length = figure
            changed = ", ".join(
                f"{key} {before[figure][key]}" for key in settings if before[figure][key] != settings[key]
            )
            raise UserError(
                f"{run.path} holds {name}{'' if length is None else f' at {length:,} tokens'} with {changed}. "
                "Ask for the same, or choose another --output."
            )
    return old.model_copy(update={"evaluate": (*(old.evaluate or ()), *_new_ones(config.evaluate or (), set(before)))})


def _settings(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[tuple[str, int | None], dict[str, Any]]]:
    """For every figure, what it depends on."""
    for spec in specs:
        settings = asdict(spec)
        lengths = settings.pop("context_lengths", ())
        if "min_document_tokens" in settings and settings["min_document_tokens"] is None:
            settings["min_document_tokens"] = max(lengths)  # which documents are used depends on the longest length
        for length in spec.context_lengths:
            yield (spec.name, length), settings


def _new_ones(specs: Sequence[EvaluationSpec], known: set[tuple[str, int | None]]) -> Iterator[EvaluationSpec]:
    """The specs with the lengths that are not known yet."""
    from dataclasses import replace

    for spec in specs:
        new = tuple(length for length in spec.context_lengths if (spec.name, length) not in known)
        if new == spec.context_lengths:
            yield spec
        elif new:
            yield replace(spec, context_lengths=new)  # type: ignore[arg-type]


def identity(location: str) -> dict[str, Any]:
    """What tells a model from another of the same name: a hash of its config, and of the ends of its weight files."""
    path = Path(location)
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"] if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - 2**20))
                digest.update(opened.read())
    return {"identity": digest.hexdigest()[:16] if path.exists() else "hub"}


def _check_same_models(run: RunDir, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, own in now.items():
        if known.get(name, own) != own:
            raise UserError(
                f"{run.path} holds figures of another model called {name} (its files have changed since). "
                "Choose another --output."
            )


def _measure(run: RunDir, one: Compared, window: int | None, config: EvaluateConfig, console: Console) -> None:
    from transformers.utils import logging as transformers_logging

    from skipwise.evaluation.runner import evaluate
    from skipwise.evaluation.unit import ConsoleSay, Setting, Subject
    from skipwise.models.load import check_vocabulary, compute_dtype, default_device, load_model, load_tokenizer

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console.print(f"{one.name}", style="bold", highlight=False)
    device = default_device()
    dtype = compute_dtype(config.dtype, device)
    tokenizer = load_tokenizer(model_config(one, config))
    held_out = _held_out(config, tokenizer, console)
    with console.status(f"evaluating {one.name}") as status:
        # In the dtype of the products, as a server would hold it.
        model = load_model(model_config(one, config), device, dtype)
        check_vocabulary(model, tokenizer)
        subject = Subject(model, tokenizer, one.stage, one.name, window, dtype, config.chat)
        setting = Setting(held_out, config.seed, run.shared, ConsoleSay(console, status))
        done = run.measured(one.stage, one.name)
        for rows in evaluate(subject, config.evaluate or (), setting, run.examples(one.short), done):
            run.add_results(rows)
            for row in rows:
                if row.status == "failed":
                    console.print(f"failed: {row.evaluation}: {row.reason}", highlight=False)


def _held_out(config: EvaluateConfig, tokenizer: Any, console: Console) -> "HeldOut":
    from skipwise.data.held_out import HeldOut, held_out_documents
    from skipwise.data.tokenised import begin_of_text, open_sources

    stores = open_sources(config.data, tokenizer, console)
    documents = held_out_documents(
        [[store.held_out] for store in stores], config.data.short_documents == "join", begin_of_text(tokenizer)
    )
    part = "" if config.data.held_out_share == 1 else "held-out "
    return HeldOut(part + ", ".join(source.source for source in config.data.sources), documents)


def differences(
    models: Sequence[Compared], rows: Sequence[EvalResult], output: Path
) -> dict[str, dict[tuple[str, int | None], Figure]]:
    """For each model but the first, how far its figures are above those of the first, by evaluation and length."""
    run = RunDir(output)
    names = dict.fromkeys(row.evaluation.partition("/")[0] for row in rows)
    lengths = {(row.evaluation.partition("/")[0], row.context_length) for row in rows}
    first, *others = [{name: _by_length(run.examples(one.short).read(name)) for name in names} for one in models]
    found: dict[str, dict[tuple[str, int | None], Figure]] = {}
    for one, own in zip(models[1:], others, strict=True):
        for name in names:
            for length, examples in own[name].items():
                figure = difference(first[name].get(length, []), examples)
                if figure is not None and (name, length) in lengths:
                    found.setdefault(one.short, {})[name, length] = figure
    return found


def _by_length(examples: list[Example]) -> dict[int | None, list[Example]]:
    by_length: dict[int | None, list[Example]] = {}
    for example in examples:
        if "score" in example or "nll" in example:
            by_length.setdefault(example["context_length"], []).append(example)
    return by_length


def as_given(values: Mapping[str, Any]) -> str:
    """The values of a configuration as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)
