"""What is wrong with the RoPE of a checkpoint, as seen by every program that reads it; and a copy that is right."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.errors import UserError
from skipwise.models.families import REFUSED, family_of, is_tested
from skipwise.models.legacy import with_legacy_rope
from skipwise.models.readers import READERS, Reading, UnreadableError, difference, transformers_5
from skipwise.models.shape import FAR, WINDOWED, far_table
from skipwise.rope.scaling import VLLM_FACTORS
from skipwise.runs import new_directory, write_json

# Lengths are whole numbers, and factors are often rounded.
ROUNDED = 0.01
# A tokenizer without a limit has a number like 1e30.
UNLIMITED = 10**9
# Rope types whose factor is the share of the window over the first one.
BY_FACTOR = ("yarn", "longrope", "linear")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: in a sentence.
        remedy: in another.
        mended: whether `mended_files` does that.
    """

    what: str
    remedy: str
    mended: bool


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the files of a model say about its RoPE.

    Attributes:
        family: model type, and by what name it is known.
        original, current: first window and the one now, in tokens.
        layers: how far they see, in a sentence each.
        readings: of every reader; a sentence where it stops.
        findings: what is wrong, worst first.
        mended: the config as it should be.
    """

    family: str
    original: int
    current: int
    layers: list[str]
    readings: dict[str, Reading | str]
    findings: list[Finding]
    mended: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the frequencies."""
        readings = {
            name: read
            if isinstance(read, str)
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
        original: the first window, if the config has lost it.

    Raises:
        UserError: for a model that has no RoPE.
    """
    inner = config.get("text_config") or config
    kind = str(inner.get("model_type"))
    if kind in REFUSED:
        raise UserError(REFUSED[kind])
    if inner.get("max_position_embeddings") is None:
        raise UserError("The config.json says no window (max_position_embeddings), so there is no RoPE to look at.")
    rope, findings = _true_rope(inner, original)
    mended = _mended(config, rope)
    target = int((mended.get("text_config") or mended)["max_position_embeddings"])
    findings += [*_about_readers(config, mended), *_about_files(others, target)]
    readings = {name: _read(name, config) for name in READERS}
    known = f"{kind}: {family_of(kind).models}" if is_tested(kind) else f"{kind}, not among those tested"
    return Diagnosis(known, _first(rope, target), target, list(_layers(inner)), readings, findings, mended)


def _true_rope(config: Mapping[str, Any], original: int | None) -> tuple[dict[str, Any], list[Finding]]:
    """The RoPE parameters of layers that see far, as they must be meant, with `window`; and what did not say so."""
    findings = []
    new, old = dict(far_table(config.get("rope_parameters") or {})), dict(config.get("rope_scaling") or {})
    names = family_of(str(config["model_type"])).legacy_names
    beside = config.get(names.get("rope_theta") or "rope_theta")
    rope = {**new, **old}  # the newest reader goes by rope_scaling, and may find less there
    rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default").replace("su", "longrope")
    rope.pop("type", None)
    if "rope_theta" not in rope and beside is None:
        findings.append(
            Finding(
                "The config has no rope_theta, so every reader takes 10,000.",
                "Put in the base of pretraining if that is another one; nothing here can know it.",
                False,
            )
        )
    elif beside is not None and "rope_theta" in rope and float(beside) != float(rope["rope_theta"]):
        findings.append(
            Finding(
                f"There are two thetas: {rope['rope_theta']:,} inside and {beside:,} beside.",
                "The one inside is kept, by which transformers 5 goes.",
                True,
            )
        )
    rope.setdefault("rope_theta", beside if beside is not None else 10000.0)
    lost = sorted(set(new) - set(old) - {"rope_theta", "rope_type", "type"}) if old else []
    if lost:
        findings.append(
            Finding(f"rope_scaling, which wins, lacks {', '.join(lost)} of rope_parameters.", "They are added.", True)
        )
    window, more = _true_window(config, rope, original)
    return {**rope, "window": window}, findings + more


def _true_window(config: Mapping[str, Any], rope: dict[str, Any], original: int | None) -> tuple[int, list[Finding]]:
    """The window, from three numbers that must agree: it, the first one and the factor. Completes `rope`."""
    window, kind = int(config["max_position_embeddings"]), rope["rope_type"]
    if kind not in BY_FACTOR or rope.get("factor") is None:
        return window, []
    factor = float(rope["factor"])
    if kind == "linear":  # has no use for the first window
        return round(original * factor) if original else window, []
    name = "original_max_position_embeddings"
    said = config.get(name) or rope.get(name)
    first = int(original or said or round(window / factor))
    rope[name] = first
    findings = []
    if said is None:
        what = f"{name} is missing, so readers take the extended window of {window:,} for it."
        findings.append(Finding(what, f"Set to {first:,}.", True))
    elif int(said) != first:
        findings.append(Finding(f"{name} is {int(said):,}, but the first window was {first:,}.", "Set to that.", True))
    if math.isclose(first * factor, window, rel_tol=ROUNDED):
        return window, findings
    if window == first:
        return round(first * factor), [*findings, _not_raised(window, factor)]
    what = f"A factor of {factor:g} times a first window of {first:,} is not the window of {window:,}."
    if not original:
        return window, [*findings, Finding(what, "Say what the first window was: --original N.", False)]
    rope["factor"] = window / first
    return window, [*findings, Finding(what, f"The factor becomes {window / first:g}.", True)]


def _not_raised(window: int, factor: float) -> Finding:
    """The first window and the one now are the same, with a factor above 1."""
    return Finding(
        f"max_position_embeddings and original_max_position_embeddings are both {window:,}, with a factor of "
        f"{factor:g}: either the former was not raised, or the first window was {round(window / factor):,}.",
        f"Raised to {round(window * factor):,}. If it is the other, say --original {round(window / factor)}.",
        True,
    )


def _mended(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its RoPE as it must be meant, in the form of every version."""
    if "text_config" in config:
        return {**config, "text_config": _mended(config["text_config"], rope)}
    parameters = {key: value for key, value in rope.items() if key != "window"}
    tables = config.get("rope_parameters") or {}
    nested = isinstance(tables.get(FAR), Mapping)
    written = {**config, "max_position_embeddings": rope["window"], "rope_scaling": None}
    written["rope_parameters"] = {**tables, FAR: parameters} if nested else parameters
    if "original_max_position_embeddings" in config:
        written["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    if parameters["rope_type"] in ("yarn", "longrope"):  # what one reader takes for granted another does not
        parameters["attention_factor"] = transformers_5(written).attention_factor
    if parameters["rope_type"] == "longrope":
        parameters |= {key: parameters["attention_factor"] for key in VLLM_FACTORS if key not in parameters}
    return with_legacy_rope(written)


def _first(rope: Mapping[str, Any], window: int) -> int:
    if rope["rope_type"] == "linear":
        return round(window / float(rope["factor"]))
    return int(rope.get("original_max_position_embeddings") or window)


def _read(name: str, config: Mapping[str, Any]) -> Reading | str:
    try:
        return READERS[name](config)
    except UnreadableError as error:
        return str(error)


def _about_readers(config: Mapping[str, Any], mended: Mapping[str, Any]) -> Iterator[Finding]:
    """Where a reader makes something else of the config than it must mean."""
    meant = transformers_5(mended)
    for name in READERS:
        now, then = _read(name, config), _read(name, mended)
        wrong = now if isinstance(now, str) else difference(now, meant)
        if wrong is None:
            continue
        still = then if isinstance(then, str) else difference(then, meant)
        remedy = "The config is written in the form of every version." if still is None else _what_to_do(name, meant)
        yield Finding(f"{name} reads something else: {wrong}.", remedy, still is None)


def _what_to_do(name: str, meant: Reading) -> str:
    """Where no config can help."""
    if name == "llama.cpp":
        return "Convert with skipwise export --gguf, which writes what the converter leaves out."
    if name == "vLLM" and meant.rope_type == "longrope":
        return "Start it with --max-model-len at the first window for short texts; it keeps one list for all."
    return "This reader cannot be told; use another, or another scaling."


def _about_files(others: Mapping[str, Mapping[str, Any]], window: int) -> Iterator[Finding]:
    """Limits in other files that are below the window."""
    limits = {"tokenizer_config.json": "model_max_length", "generation_config.json": "max_length"}
    for file, key in limits.items():
        limit = others.get(file, {}).get(key)
        if limit is not None and int(limit) < min(window, UNLIMITED):
            raised = "Raised." if file == "tokenizer_config.json" else "Taken out."
            yield Finding(f"{key} in {file} is {int(limit):,}, below the window of {window:,}.", raised, True)


def mended_files(diagnosis: Diagnosis, others: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contents of the files that change."""
    files = {"config.json": diagnosis.mended}
    tokenizer = dict(others.get("tokenizer_config.json", {}))
    if tokenizer and int(tokenizer.get("model_max_length") or UNLIMITED) < diagnosis.current:
        files["tokenizer_config.json"] = {**tokenizer, "model_max_length": diagnosis.current}
    generation = dict(others.get("generation_config.json", {}))
    if int(generation.get("max_length") or UNLIMITED) < diagnosis.current:
        del generation["max_length"]
        files["generation_config.json"] = generation
    return files


def mended_copy(directory: Path, diagnosis: Diagnosis, others: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write the files of a model once more, with those that change as they should be; all of them or nothing.

    Raises:
        UserError: when there is no directory to copy, or one is in the way.
    """
    if not directory.is_dir():
        raise UserError(f"--fix copies a directory, and {directory} is none. Download the model and name that.")
    with new_directory(output) as temporary:
        shutil.copytree(directory, temporary, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        for name, content in mended_files(diagnosis, others).items():
            write_json(temporary / name, content)


def _layers(config: Mapping[str, Any]) -> Iterator[str]:
    """How far layers see, and which of them have positions."""
    total = int(config["num_hidden_layers"])
    window, kinds = config.get("sliding_window"), config.get("layer_types") or []
    windowed = [number for number, kind in enumerate(kinds) if kind == WINDOWED]
    if not kinds and window and config.get("use_sliding_window", True):
        windowed = list(range(total))
    others = sorted(set(kinds) - {FAR, WINDOWED})
    far = [number for number in range(total) if number not in windowed]
    if windowed and window:
        yield f"{len(windowed)} of {total} see only the last {int(window):,} tokens: {_numbers(windowed)}"
        yield f"{len(far)} see all of the text" + (f": {_numbers(far)}" if far else "")
    else:
        yield f"all {total} see all of the text"
    if others:
        yield f"some are of other kinds, which cannot be trained with skips: {', '.join(others)}"
    without = [number for number, has in enumerate(config.get("no_rope_layers") or []) if not has]
    if without:
        yield f"{len(without)} have no positions, and are left as they are: {_numbers(without)}"


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown}, ..."


def read_beside(directory: Path) -> dict[str, dict[str, Any]]:
    """The other files of a model that hold a limit."""
    found = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            try:
                content = json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{directory / name} cannot be read as JSON: {error}") from error
            if isinstance(content, dict):
                found[name] = content
    return found
