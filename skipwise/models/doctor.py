"""What is wrong with the RoPE of a checkpoint, as seen by every program that reads it; and a copy that is right."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.errors import UserError
from skipwise.models.families import family_of, is_encoder, is_tested, why_refused
from skipwise.models.legacy import with_legacy_rope
from skipwise.models.readers import READERS, Reading, UnreadableError, difference, transformers_5
from skipwise.models.shape import FAR, WINDOWED, far_table
from skipwise.models.stock import stock_config
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
        limit: of a reader, and nothing wrong with the model.
    """

    what: str
    remedy: str
    mended: bool
    limit: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the files of a model say about its RoPE.

    Attributes:
        family: model type, and by what name it is known.
        original, current: first window and the one now, in tokens.
        layers: how far they see, in a sentence each.
        readings: of every reader that was looked at for such models; a sentence where it stops.
        findings: what is wrong, worst first.
        mended: the config as it should be.
        as_trained: whether it is known to be what was trained.
    """

    family: str
    original: int
    current: int
    layers: list[str]
    readings: dict[str, Reading | str]
    findings: list[Finding]
    mended: dict[str, Any]
    as_trained: bool = False

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
        UserError: for a model that has no RoPE, or a config that its class does not take.
    """
    inner = config.get("text_config") or config
    refused = why_refused(str(inner.get("model_type")), bool(inner.get("alibi")))
    if refused:
        raise UserError(refused, code="family_not_supported")
    stock = stock_config(config)
    kind = str(stock["model_type"])
    transformers_5(config)  # has RoPE, and one that can be computed
    rope, window, findings = _meant(inner, stock, original)
    mended = _mended(config, stock, rope, window)
    readers = [name for name in READERS if name.startswith("transformers") or not is_encoder(kind)]
    findings += [*_about_readers(config, mended, readers), *_about_files(others, window)]
    readings = {name: _read(name, config) for name in readers}
    known = f"{kind}: {family_of(kind).models}" if is_tested(kind) else f"{kind}, not among those tested"
    return Diagnosis(known, _first(rope, window), window, list(_layers(stock)), readings, findings, mended)


def _meant(
    given: Mapping[str, Any], stock: Mapping[str, Any], original: int | None
) -> tuple[dict[str, Any], int, list[Finding]]:
    """The RoPE parameters of layers that see far and the window, as they must be meant; and what did not say so."""
    new, old = far_table(given.get("rope_parameters") or {}), given.get("rope_scaling") or {}
    # The class goes by rope_scaling where it is there, and may find less in it.
    rope = {**new, **far_table(stock["rope_parameters"])}
    rope["rope_type"] = str(rope.get("rope_type") or "default").replace("su", "longrope")
    rope.pop("type", None)
    findings = []
    beside = given.get(family_of(str(stock["model_type"])).legacy_names.get("rope_theta") or "rope_theta")
    inside = new.get("rope_theta")
    if beside is not None and inside is not None and float(beside) != float(inside):
        what = f"There are two thetas: {float(inside):,.6g} inside and {float(beside):,.6g} beside."
        findings.append(Finding(what, "The one inside is kept, by which transformers 5 goes.", True))
        rope["rope_theta"] = inside
    lost = sorted(set(new) - set(old) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}) if old else []
    if lost:
        what = f"rope_scaling, which wins, lacks {', '.join(lost)} of rope_parameters."
        findings.append(Finding(what, "They are added.", True))
    window, more = _true_window(given, rope, int(stock["max_position_embeddings"]), original)
    return rope, window, findings + more


def _true_window(
    given: Mapping[str, Any], rope: dict[str, Any], window: int, original: int | None
) -> tuple[int, list[Finding]]:
    """The window, from three numbers that must agree: it, the first one and the factor. Completes `rope`."""
    if rope["rope_type"] not in BY_FACTOR or rope.get("factor") is None:
        return window, []
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":  # has no use for the first window
        return round(original * factor) if original else window, []
    name = "original_max_position_embeddings"
    inside = {**(given.get("rope_parameters") or {}), **(given.get("rope_scaling") or {})}
    said = given.get(name) or far_table(inside).get(name)
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
    if first * factor > window or original:
        return round(first * factor), [*findings, _other_window(window, first, factor, original)]
    what = f"A factor of {factor:g} times a first window of {first:,} is not the window of {window:,}."
    return window, [*findings, Finding(what, "Say what the first window was: --original N.", False)]


def _other_window(window: int, first: int, factor: float, original: int | None) -> Finding:
    """The window is another than the factor says."""
    wanted = round(first * factor)
    what = f"max_position_embeddings is {window:,}, but a factor of {factor:g} makes {wanted:,} of {first:,}"
    remedy = f"Set to {wanted:,}."
    if original is None:
        what += f", unless the first window was {round(window / factor):,}"
        remedy += f" If it was, say --original {round(window / factor)}."
    return Finding(f"{what}.", remedy, True)


def _mended(
    config: Mapping[str, Any], stock: Mapping[str, Any], rope: Mapping[str, Any], window: int
) -> dict[str, Any]:
    """The config with its RoPE as it must be meant, in the form of every version."""
    if config.get("text_config"):
        return {**config, "text_config": _mended(config["text_config"], stock, rope, window)}
    parameters, tables = dict(rope), stock["rope_parameters"]
    nested = far_table(tables) is not tables
    named = {"model_type": stock["model_type"], "max_position_embeddings": window, "rope_scaling": None}
    written = {**config, **named, "rope_parameters": {**tables, FAR: parameters} if nested else parameters}
    if config.get("original_max_position_embeddings"):
        written["original_max_position_embeddings"] = _first(rope, window)
    if parameters["rope_type"] in ("yarn", "longrope") and not parameters.get("mscale"):
        # Where it is not written, readers take defaults of their own.
        parameters["attention_factor"] = transformers_5(written).attention_factor
    if parameters["rope_type"] == "longrope":
        parameters.setdefault("original_max_position_embeddings", _first(rope, window))
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


def _about_readers(config: Mapping[str, Any], mended: Mapping[str, Any], readers: Iterable[str]) -> Iterator[Finding]:
    """Where a reader makes something else of the config than it must mean."""
    meant = transformers_5(mended)
    alike: dict[tuple[str, str, bool], list[str]] = {}  # one cause makes many readers go wrong in the same way
    for name in readers:
        now, then = _read(name, config), _read(name, mended)
        wrong = now if isinstance(now, str) else difference(now, meant)
        if wrong is None:
            continue
        still = then if isinstance(then, str) else difference(then, meant)
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
    """Contents of the files that change; none where nothing can be mended."""
    files = {}
    if any(finding.mended for finding in diagnosis.findings):
        files["config.json"] = diagnosis.mended
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
        raise UserError(
            f"--fix copies a directory, and {directory} is none. Download the model and name that.",
            code="not_a_directory",
        )
    with new_directory(output) as temporary:
        shutil.copytree(directory, temporary, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        for name, content in mended_files(diagnosis, others).items():
            write_json(temporary / name, content)


def _layers(config: Mapping[str, Any]) -> Iterator[str]:
    """How far layers see, and which of them have positions."""
    total = int(config.get("num_hidden_layers") or 0)
    window, kinds = config.get("sliding_window"), config.get("layer_types") or []
    both_sides = not window and config.get("local_attention")  # ModernBERT: that many tokens around each
    if both_sides:
        window = int(config["local_attention"]) // 2
    windowed = [number for number, kind in enumerate(kinds) if kind == WINDOWED]
    if not kinds and window and config.get("use_sliding_window", True):
        windowed = list(range(total))
    others = sorted(set(kinds) - {FAR, WINDOWED})
    far = [number for number in range(total) if number not in windowed]
    if windowed and window:
        near = f"{int(window):,} tokens to each side" if both_sides else f"the last {int(window):,} tokens"
        yield f"{len(windowed)} of {total} see only {near}: {_numbers(windowed)}"
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
                raise UserError(
                    f"{directory / name} cannot be read as JSON: {error}", code="unreadable_json"
                ) from error
            if isinstance(content, dict):
                found[name] = content
    return found
