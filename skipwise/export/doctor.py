"""What is wrong with the RoPE of a checkpoint, as seen by every program that reads it; and a copy that is right."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipwise.errors import UserError
from skipwise.export.hf_config import completed_config
from skipwise.export.legacy import with_legacy_rope
from skipwise.export.readers import NO_READING, READERS, Reading, UnreadableError, difference, transformers_5
from skipwise.models.families import family_of, is_encoder, is_tested, why_refused
from skipwise.models.shape import knows_key
from skipwise.models.windows import (
    BY_ORIGINAL,
    FULL,
    ORIGINAL,
    ROUNDED,
    SLIDING,
    UNLIMITED,
    Windows,
    full_table,
    rope_of,
    windows_of,
)
from skipwise.rope.scaling import VLLM_FACTORS
from skipwise.utils.files import new_directory, write_json

# Rope types whose factor is the share of the window over the first one.
BY_FACTOR = ("yarn", "longrope", "linear")
# Kinds of layers that see all of the text, or its last tokens.
SEEING = (FULL, SLIDING, "attention")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: in a sentence.
        remedy: in another.
        fixed: whether `mended_files` does that.
        limit: of a reader, and nothing wrong with the model.
    """

    what: str
    remedy: str
    fixed: bool
    limit: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the files of a model say about its RoPE.

    Attributes:
        family: model type, and by what name it is known.
        original, current: original window and the one now, in tokens.
        layers: how far they see, in a sentence each.
        readings: of every reader that was looked at for such models; the reason where it stops.
        findings: what is wrong, worst first.
        fixed: the config as it should be.
        as_trained: whether it is known to be what was trained.
    """

    family: str
    original: int
    current: int
    layers: list[str]
    readings: dict[str, Reading | UnreadableError]
    findings: list[Finding]
    fixed: dict[str, Any]
    as_trained: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the frequencies."""
        readings = {
            name: str(read)
            if isinstance(read, UnreadableError)
            else {key: value for key, value in vars(read).items() if key not in ("short", "long")}
            for name, read in self.readings.items()
        }
        return {**vars(self), "readings": readings, "findings": [vars(finding) for finding in self.findings]}


def diagnose(
    config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], original: int | None = None
) -> Diagnosis:
    """Look at a `config.json` and what stands beside it.

    Args:
        config: its content.
        others: contents of `tokenizer_config.json` and `generation_config.json`, where they are.
        original: the original window, if the config has lost it.

    Raises:
        UserError: for a model that has no RoPE, or a config that its class does not take.
    """
    inner = config.get("text_config") or config
    refused = why_refused(str(inner.get("model_type")), bool(inner.get("alibi")))
    if refused:
        raise UserError(refused, code="family_not_supported")
    hf = completed_config(config)
    kind = str(hf["model_type"])
    transformers_5(config)  # has RoPE, and one that can be computed
    limit = others.get("tokenizer_config.json", {}).get("model_max_length")
    windows = windows_of(hf, inner, int(limit) if limit else None, original)
    rope, findings = _meant(inner, hf)
    findings += _complete(rope, inner, windows)
    fixed = dict(config)
    if _can_fix(config, hf):
        fixed = _fixed(config, hf, rope, windows)
    else:
        findings = [replace(finding, fixed=False) for finding in findings]
    looked_at = is_tested(kind) and not is_encoder(kind)  # by vLLM and llama.cpp
    readers = [name for name in READERS if name.startswith("transformers") or looked_at]
    findings += [*_about_readers(config, fixed, readers), *_about_files(others, windows.current)]
    readings = {name: _read(name, config) for name in readers}
    known = f"{kind}: {family_of(kind).models}" if is_tested(kind) else f"{kind}, not among those tested"
    layers = list(_layers(hf, windows.current))
    return Diagnosis(known, windows.original, windows.current, layers, readings, findings, fixed)


def _can_fix(config: Mapping[str, Any], hf: Mapping[str, Any]) -> bool:
    """Whether the RoPE stands where a copy would write it: some wrappers keep that of their text model at the top."""
    return bool(config.get("text_config")) or config.get("model_type") == hf["model_type"]


def _meant(given: Mapping[str, Any], hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The RoPE parameters of layers that see far, as they must be meant; and what did not say so."""
    new, old = full_table(given.get("rope_parameters") or {}), given.get("rope_scaling") or {}
    # The class goes by rope_scaling where it is there, and may find less in it.
    rope = {**new, **full_table(hf["rope_parameters"])}
    rope["rope_type"] = str(rope.get("rope_type") or "default").replace("su", "longrope")
    rope.pop("type", None)
    findings = []
    beside = given.get(family_of(str(hf["model_type"])).legacy_names.get("rope_theta") or "rope_theta")
    inside = new.get("rope_theta")
    if beside is not None and inside is not None and float(beside) != float(inside):
        what = f"There are two thetas: {float(inside):,.6g} inside and {float(beside):,.6g} beside."
        findings.append(Finding(what, "The one inside is kept, by which transformers 5 goes.", True))
        rope["rope_theta"] = inside
    lost = sorted(set(new) - set(old) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}) if old else []
    if lost:
        what = f"rope_scaling, which wins, lacks {', '.join(lost)} of rope_parameters."
        findings.append(Finding(what, "They are added.", True))
    return rope, findings


def _complete(rope: dict[str, Any], written: Mapping[str, Any], windows: Windows) -> list[Finding]:
    """Write both windows into the RoPE parameters, where they belong; and what of them was not as it must be.

    Args:
        rope: completed in place.
        written: `config.json` as it is.
        windows: as they must be meant.
    """
    if windows.ambiguity is not None:
        return [Finding(f"{windows.ambiguity[0].upper()}{windows.ambiguity[1:]}", "", False)]
    findings = []
    said = rope_of(written).get(ORIGINAL) or written.get(ORIGINAL)
    if rope["rope_type"] in BY_ORIGINAL:
        rope[ORIGINAL] = windows.original
        if said is None:
            what = f"{ORIGINAL} is missing, which was {windows.original:,}."
            findings.append(Finding(what, "It is written.", True))
        elif int(said) != windows.original:
            what = f"{ORIGINAL} is {int(said):,}, but the original window was {windows.original:,}."
            findings.append(Finding(what, "Set to that.", True))
    claimed = int(written.get("max_position_embeddings") or windows.current)
    if claimed < windows.current and rope["rope_type"] in BY_FACTOR:
        what = (
            f"max_position_embeddings is {claimed:,}, but a factor of {float(rope['factor']):g} makes "
            f"{windows.current:,} of {windows.original:,}."
        )
        findings.append(Finding(what, f"Set to {windows.current:,}.", True))
    by_factor = round(windows.original * float(rope.get("factor") or 1.0))
    if rope["rope_type"] == "yarn" and not math.isclose(by_factor, windows.current, rel_tol=ROUNDED):
        what = (
            f"A factor of {float(rope['factor']):g} times an original window of {windows.original:,} is not the window "
            f"of {windows.current:,}."
        )
        findings.append(Finding(what, "Say what the original window was: --original N.", False))
    return findings


def _fixed(
    config: Mapping[str, Any], hf: Mapping[str, Any], rope: Mapping[str, Any], windows: Windows
) -> dict[str, Any]:
    """The config with its RoPE as it must be meant, in the form of every version."""
    if config.get("text_config"):
        text = {"model_type": hf["model_type"], **config["text_config"]}
        return {**config, "text_config": _fixed(text, hf, rope, windows)}
    parameters, tables = dict(rope), hf["rope_parameters"]
    nested = full_table(tables) is not tables
    named = {"max_position_embeddings": windows.current, "rope_scaling": None}
    written = {**config, **named, "rope_parameters": {**tables, FULL: parameters} if nested else parameters}
    if config.get(ORIGINAL):
        written[ORIGINAL] = windows.original
    if parameters["rope_type"] in ("yarn", "longrope") and not parameters.get("mscale"):
        # Where it is not written, readers take defaults of their own.
        parameters["attention_factor"] = transformers_5(written).attention_factor
    if parameters["rope_type"] == "longrope":
        parameters |= {key: parameters["attention_factor"] for key in VLLM_FACTORS if key not in parameters}
    return with_legacy_rope(written)


def _read(name: str, config: Mapping[str, Any]) -> Reading | UnreadableError:
    try:
        return READERS[name](config)
    except UnreadableError as error:
        return error


def _about_readers(config: Mapping[str, Any], fixed: Mapping[str, Any], readers: Iterable[str]) -> Iterator[Finding]:
    """Where a reader makes something else of the config than it must mean."""
    meant = transformers_5(fixed)
    alike: dict[tuple[str, str, bool], list[str]] = {}  # one cause makes many readers go wrong in the same way
    for name in readers:
        now, then = _read(name, config), _read(name, fixed)
        if isinstance(now, UnreadableError) and now.code in NO_READING:
            continue
        wrong = str(now) if isinstance(now, UnreadableError) else difference(now, meant)
        if wrong is None:
            continue
        still = str(then) if isinstance(then, UnreadableError) else difference(then, meant)
        remedy = "The config is written in the form of every version." if still is None else _what_to_do(name, meant)
        alike.setdefault((wrong, remedy, still is not None), []).append(name)
    for (wrong, remedy, limit), names in alike.items():
        what = f"{', '.join(names)} {'reads' if len(names) == 1 else 'read'} something else: {wrong}."
        yield Finding(what, remedy, not limit, limit=limit)


def _what_to_do(name: str, meant: Reading) -> str:
    """Where no config can help."""
    if name == "llama.cpp":
        return "Convert with skipwise export --gguf, which writes what the converter leaves out."
    if name == "vLLM" and meant.rope_type == "longrope":
        return "Start it with --max-model-len at the original window for short texts; it keeps one list for all."
    return "This reader cannot be told; use another, or another scaling."


def _about_files(others: Mapping[str, Mapping[str, Any]], window: int) -> Iterator[Finding]:
    """Limits in other files that are below the window."""
    limits = {"tokenizer_config.json": "model_max_length", "generation_config.json": "max_length"}
    for file, key in limits.items():
        limit = others.get(file, {}).get(key)
        if limit is not None and int(limit) < min(window, UNLIMITED):
            raised = "Raised." if file == "tokenizer_config.json" else "Taken out."
            yield Finding(f"{key} in {file} is {int(limit):,}, below the window of {window:,}.", raised, True)


def fixed_files(diagnosis: Diagnosis, others: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contents of the files that change; none where nothing can be fixed."""
    files = {}
    if any(finding.fixed for finding in diagnosis.findings):
        files["config.json"] = diagnosis.fixed
    tokenizer = dict(others.get("tokenizer_config.json", {}))
    if tokenizer and int(tokenizer.get("model_max_length") or UNLIMITED) < diagnosis.current:
        files["tokenizer_config.json"] = {**tokenizer, "model_max_length": diagnosis.current}
    generation = dict(others.get("generation_config.json", {}))
    if int(generation.get("max_length") or UNLIMITED) < diagnosis.current:
        del generation["max_length"]
        files["generation_config.json"] = generation
    return files


def fixed_copy(directory: Path, diagnosis: Diagnosis, others: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write the files of a model once more, with those that change as they should be; all of them or nothing.

    Raises:
        UserError: when there is no directory to copy, or one is in the way.
    """
    if not directory.is_dir():
        raise UserError(
            f"--fix copies a directory, and {directory} is none. Download the model and name that.",
            code="not_a_directory",
        )
    with new_directory(output) as temporary:
        shutil.copytree(directory, temporary, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        for name, content in fixed_files(diagnosis, others).items():
            write_json(temporary / name, content)
        check_same_class(directory, temporary)


def check_same_class(before: Path, after: Path) -> None:
    """Raise `UserError` unless transformers opens a repaired config as the class it was."""
    from skipwise.models.config import ModelConfig
    from skipwise.models.load import load_config

    was, now = (type(load_config(ModelConfig(path=str(path)))).__name__ for path in (before, after))
    if was != now:
        raise UserError(
            f"A repaired copy must be the same model, but its config would be read as {now}, and not as {was}. "
            "Nothing is written; fix it by hand.",
            code="repair_changes_model",
        )


def _layers(config: Mapping[str, Any], current: int) -> Iterator[str]:
    """How far layers see, and which of them have positions.

    Args:
        config: of the language model, completed.
        current: its window, in tokens. Layers that see as much see all of a text.
    """
    from transformers import CONFIG_MAPPING

    total, kinds = int(config.get("num_hidden_layers") or 0), config.get("layer_types") or []
    window, around = config.get("sliding_window"), config.get("local_attention")
    if not knows_key(CONFIG_MAPPING[config["model_type"]], "sliding_window"):
        window = None
    both_sides = bool(around) and not window  # ModernBERT: that many tokens around each
    near = int(around or 0) // 2 if both_sides else int(window or 0)
    windowed = [number for number, kind in enumerate(kinds) if kind == SLIDING]
    if not kinds and near and config.get("use_sliding_window", True):
        windowed = list(range(total))
    if not near or near >= current:
        windowed = []
    others = {number: kind for number, kind in enumerate(kinds) if kind not in SEEING}
    far = [number for number in range(total) if number not in windowed and number not in others]
    seen = f"{near:,} tokens to each side" if both_sides else f"the last {near:,} tokens"
    if windowed and len(windowed) == total:
        yield f"all {total} see only {seen}; what is farther away reaches a token through several layers or not at all"
    elif windowed:
        yield f"{len(windowed)} of {total} see only {seen}: {_numbers(windowed)}"
    if others:
        named = ", ".join(sorted(set(others.values())))
        yield f"{len(others)} of {total} are of other kinds, which cannot be trained with skips: {named}"
    if far:
        some = f"{len(far)} of {total} see all of the text: {_numbers(far)}"
        yield f"all {total} see all of the text" if len(far) == total else some
    without = [number for number, has in enumerate(config.get("no_rope_layers") or []) if not has]
    if without:
        yield f"{len(without)} have no positions, and are left as they are: {_numbers(without)}"


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown}, ..."


def read_siblings(directory: Path) -> dict[str, dict[str, Any]]:
    """The other files of a model that hold a limit."""
    found = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            try:
                content = json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{directory / name} cannot be read as JSON: {error}", code="unreadable_json"
                ) from error
            if isinstance(content, dict):
                found[name] = content
    return found
