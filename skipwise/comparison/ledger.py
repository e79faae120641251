"""An evaluation directory holds one setting per figure: nothing that was measured in another way is mixed."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.config import EvaluateConfig
from skipwise.config_files import parse_evaluate_config, read_yaml
from skipwise.digests import short_digest
from skipwise.errors import UserError
from skipwise.evaluation.specs import (
    EvaluationSpec,
    Harness,
    QuestionAnswering,
    Summarization,
)
from skipwise.models.locate import model_location
from skipwise.runs import RunDir, figure_of, read_json, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What is measured at once, and at which context length.
FigureKey = tuple[str, int | None]


def joined(run: RunDir, config: EvaluateConfig) -> EvaluateConfig:
    """The configuration of an evaluation directory, with what is new.

    Raises:
        UserError: when a figure that it holds was measured in another way.
    """
    if not run.resolved.exists():
        return config
    old = parse_evaluate_config(read_yaml(run.resolved))
    held = _held(run)
    if held:
        for section in ("data", "dtype", "attn_implementation", "chat", "seed"):
            if getattr(old, section) != getattr(config, section):
                raise UserError(
                    f"{run.path} was evaluated with other {section} settings (see {run.resolved}). "
                    "Use the same one, or choose another --output.",
                    code="configuration_changed",
                )
    before = {key: settings for key, settings in _settings(old.evaluate or ()) if key in held}
    for key, settings in _settings(config.evaluate or ()):
        old_settings = before.get(key, settings)
        if old_settings != settings:
            at = "" if key[1] is None else f" at {key[1]:,} tokens"
            changed = ", ".join(f"{name} {value}" for name, value in old_settings.items() if settings[name] != value)
            raise UserError(
                f"{run.path} holds {key[0]}{at} with {changed}. Ask for the same, or choose another --output.",
                code="configuration_changed",
            )
    kept = _without(old.evaluate or (), set(figures(old.evaluate or ())) - set(before))
    return config.model_copy(update={"evaluate": (*kept, *_without(config.evaluate or (), set(before)))})


def _held(run: RunDir) -> set[FigureKey]:
    """What a directory holds rows or examples of."""
    held = {figure_of(row) for row in run.read_results() if row.status != "failed"}
    for path in (run.path / "examples").glob("*/*.jsonl"):
        for line in read_lines(path):
            task = f"/{line['task']}" if path.stem == "harness" else ""
            held.add((path.stem + task, line["context_length"]))
    return held


def _settings(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[FigureKey, dict[str, Any]]]:
    """For every figure, what it depends on."""
    beside = {"context_lengths", "tasks"}  # part of the figure's own name
    no_matter = {"batch_size", "min_document_tokens"}  # the documents themselves are named
    for spec in specs:
        left_out = (beside if isinstance(spec, Harness) else {"context_lengths"}) | no_matter
        settings = {key: value for key, value in asdict(spec).items() if key not in left_out}
        yield from ((key, settings) for key in figures([spec]))


def _without(specs: Sequence[EvaluationSpec], known: set[FigureKey]) -> Iterator[EvaluationSpec]:
    """The specs with what is not known yet."""
    for spec in specs:
        if isinstance(spec, Harness):
            tasks = tuple(task for task in spec.tasks if (f"harness/{task}", None) not in known)
            if tasks:
                yield replace(spec, tasks=tasks)
        else:
            lengths = tuple(length for length in spec.context_lengths if (spec.name, length) not in known)
            if lengths:
                yield replace(spec, context_lengths=lengths)


def same(
    run: RunDir, file: Path, now: Mapping[str, Any], what: str, may_change: AbstractSet[str] = frozenset()
) -> dict[str, Any]:
    """What a file of the directory knows together with what is so now.

    Raises:
        UserError: when something has changed.
    """
    known = read_json(file) if file.exists() else {}
    for name, own in now.items():
        if name not in may_change and known.get(name, own) != own:
            raise UserError(
                f"{run.path} holds figures of another {what} {name}: it has changed since. Choose another --output.",
                code="content_changed",
            )
    return known | dict(now)


def check_names(run: RunDir, identities: Mapping[str, Any]) -> None:
    """Examples are kept under short names, so each must belong to one model."""
    owners: dict[str, str] = {}
    for name, own in identities.items():
        if owners.setdefault(own["short"], name) != name:
            raise UserError(
                f"{run.path} already holds a model that is called {own['short']!r}: {owners[own['short']]}. "
                f"Choose another --output for {name}.",
                code="duplicate_model_name",
            )


def identity(model: str, config: "PreTrainedConfig") -> dict[str, str]:
    """What tells a model from another of the same name: sizes and ends of its files, or a commit of the hub."""
    path = Path(model_location(model))
    if not path.exists():
        return {"commit": str(getattr(config, "_commit_hash", None))}
    suffixes = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes) if path.is_dir() else [path]
    ends = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            opened.seek(max(0, size - 2**20))
            ends.append(f"{file.name} {size} {hashlib.sha256(opened.read()).hexdigest()}")
    return {"identity": short_digest("\n".join(ends))}


def held_documents(run: RunDir) -> dict[str, tuple[str, ...]]:
    """By evaluation, the documents that what a directory holds was measured on."""
    if not run.resolved.exists():
        return {}
    names = {name for name, _ in _held(run)}
    specs = parse_evaluate_config(read_yaml(run.resolved)).evaluate or ()
    found = {spec.name: getattr(spec, "document_ids", None) for spec in specs if spec.name in names}
    return {name: ids for name, ids in found.items() if ids is not None}


def without_figures(config: EvaluateConfig, run: RunDir) -> set[str]:
    """Sources of records of which all that was tried failed; their files may be mended."""
    held = {name for name, _ in _held(run)}
    specs = [spec for spec in config.evaluate or () if isinstance(spec, QuestionAnswering | Summarization)]
    return {spec.source for spec in specs if spec.name not in held}


def file_digests(config: EvaluateConfig) -> dict[str, str]:
    """Of the records that questions and summaries are taken from."""
    digests = {}
    for spec in config.evaluate or ():
        if isinstance(spec, QuestionAnswering | Summarization) and Path(spec.source).expanduser().is_file():
            content = Path(spec.source).expanduser().read_bytes()
            digests[spec.source] = short_digest(content)
    return digests


def figures(specs: Sequence[EvaluationSpec]) -> Iterator[FigureKey]:
    """What specs ask for."""
    for spec in specs:
        if isinstance(spec, Harness):
            yield from ((f"harness/{task}", None) for task in spec.tasks)
        else:
            yield from ((spec.name, length) for length in spec.context_lengths)
