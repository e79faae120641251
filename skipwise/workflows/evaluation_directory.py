"""An evaluation directory holds one setting per result: nothing that was measured in another way is mixed."""

import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.config.files import parse_evaluate_config, read_yaml
from skipwise.config.run import EvaluateConfig
from skipwise.errors import UserError
from skipwise.evaluation.results import ResultKey, result_key
from skipwise.evaluation.specs import result_keys, settings_by_result, source_of, without_results
from skipwise.models.locate import model_location
from skipwise.runs.directory import RunDir
from skipwise.utils.files import read_json, read_lines, short_hash

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def joined(run: RunDir, config: EvaluateConfig) -> EvaluateConfig:
    """The configuration of an evaluation directory, with what is new.

    Raises:
        UserError: when a result that it holds was measured in another way.
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
    before = {key: settings for key, settings in settings_by_result(old.evaluate or ()) if key in held}
    for key, settings in settings_by_result(config.evaluate or ()):
        old_settings = before.get(key, settings)
        if old_settings != settings:
            at = "" if key[1] is None else f" at {key[1]:,} tokens"
            changed = ", ".join(f"{name} {value}" for name, value in old_settings.items() if settings[name] != value)
            raise UserError(
                f"{run.path} holds {key[0]}{at} with {changed}. Ask for the same, or choose another --output.",
                code="configuration_changed",
            )
    kept = without_results(old.evaluate or (), set(result_keys(old.evaluate or ())) - set(before))
    return config.model_copy(update={"evaluate": (*kept, *without_results(config.evaluate or (), set(before)))})


def _held(run: RunDir) -> set[ResultKey]:
    """What a directory holds rows or examples of."""
    held = {result_key(row) for row in run.read_results() if row.status != "failed"}
    for path in (run.path / "examples").glob("*/*.jsonl"):
        for line in read_lines(path):
            task = f"/{line['task']}" if path.stem == "harness" else ""
            held.add((path.stem + task, line["context_length"]))
    return held


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
                f"{run.path} holds results of another {what} {name}: it has changed since. Choose another --output.",
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
    return {"identity": short_hash("\n".join(ends))}


def held_documents(run: RunDir) -> dict[str, tuple[str, ...]]:
    """By evaluation, the documents that what a directory holds was measured on."""
    if not run.resolved.exists():
        return {}
    names = {name for name, _ in _held(run)}
    specs = parse_evaluate_config(read_yaml(run.resolved)).evaluate or ()
    found = {spec.name: getattr(spec, "document_ids", None) for spec in specs if spec.name in names}
    return {name: ids for name, ids in found.items() if ids is not None}


def without_values(config: EvaluateConfig, run: RunDir) -> set[str]:
    """Sources of records of which all that was tried failed; their files may be fixed."""
    held = {name for name, _ in _held(run)}
    sources = {source_of(spec) for spec in config.evaluate or () if spec.name not in held}
    return {source for source in sources if source is not None}


def file_hashes(config: EvaluateConfig) -> dict[str, str]:
    """Of the records that questions and summaries are taken from."""
    sources = {source for spec in config.evaluate or () if (source := source_of(spec)) is not None}
    files = {source: Path(source).expanduser() for source in sorted(sources)}
    return {source: short_hash(file.read_bytes()) for source, file in files.items() if file.is_file()}
