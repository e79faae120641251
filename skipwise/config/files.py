"""Configurations in and out: YAML files and flags, and one message for all that is wrong with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from skipwise.config.run import EvaluateConfig, RunConfig, method_overrides
from skipwise.data.config import DataConfig, DocumentsConfig, SourceConfig
from skipwise.errors import UserError, nearest
from skipwise.evaluation.specs import EVALUATIONS
from skipwise.positions import SAMPLERS
from skipwise.rope import ROPE_SCALINGS
from skipwise.utils.sections import name_of
from skipwise.utils.settings import Section, expand_name


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: when it cannot be read, is no YAML, or no mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no file {path}. Check the name; skipwise config init prints one to begin with.",
            code="file_not_found",
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}", code="unreadable_yaml") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} must hold a mapping of sections (model, lengths, data, ...), not {type(value).__name__}.",
            code="not_a_mapping",
        )
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section.

    A section that is chosen by name is replaced, not merged, when the name changes; so are the sources
    of the data when others are given.
    """
    result = dict(base)
    for key, value in over.items():
        old = expand_name(result.get(key)) if key in ("positions", "rope") else result.get(key)
        if key == "data":
            old = _data_section(old, replaced=isinstance(value, str) or bool({"source", "sources"} & set(value)))
            value = {"source": value} if isinstance(value, str) else value
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same_choice = value.get("name", old.get("name")) == old.get("name")
            value = merge(old, value) if same_choice else value
        result[key] = value
    return result


def _data_section(value: object, replaced: bool) -> dict[str, Any]:
    """A data section written out; without its sources when others replace them."""
    section = {"source": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    return {key: section[key] for key in section if not (replaced and key in ("source", "sources"))}


def parse_assignment(text: str) -> dict[str, Any]:
    """`a.b=v` -> `{"a": {"b": v}}`, with the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise UserError(
            f"--set takes section.key=value, not {text!r}. Example: --set train.learning_rate=1e-5",
            code="malformed_assignment",
        )
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {key}= takes a YAML value, but {value!r} is none: {error}", code="unreadable_yaml"
        ) from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)


def values_from_flags(
    model: str, flags: Mapping[str, Any], method: str | None, assignments: list[str] | None
) -> dict[str, Any]:
    """The values of a run's configuration: a file's or a model's, with what was said on the command line over them.

    Args:
        model: what names a model, or a YAML file.
        flags: sections and keys, None where nothing was said.
        method: a name of `METHODS`, or None.
        assignments: `section.key=value`, which win; None is none.

    Raises:
        UserError: for a file that cannot be read, an unknown method and an assignment that is none.
    """
    named = model.endswith((".yaml", ".yml"))
    values: dict[str, Any] = read_yaml(Path(model)) if named else {"model": {"path": model}}
    values = merge(values, only_given(flags))
    values = merge(values, method_overrides(method) if method else {})
    for assignment in assignments or []:
        values = merge(values, parse_assignment(assignment))
    return values


def only_given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Only the flags that were given."""
    kept = {key: only_given(value) if isinstance(value, Mapping) else value for key, value in flags.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a nested mapping and make it a `RunConfig`.

    Raises:
        UserError: one message that lists every mistake with its path.
    """
    return parse_section(RunConfig, values)


# What earlier versions had and wrote into run directories: keys, and values of keys that are still there.
REMOVED_KEYS = {"auto_find_batch_size", "target_growth"}
REMOVED_VALUES = {"skips": "ends"}


def parse_written(values: Mapping[str, Any]) -> RunConfig:
    """`parse_config` for what is in a run directory: settings that earlier versions had are left out."""
    return parse_config(without_removed(values))


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that earlier versions had."""
    return {
        key: without_removed(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in REMOVED_KEYS and (key not in REMOVED_VALUES or value != REMOVED_VALUES[key])
    }


def parse_evaluate_config(values: Mapping[str, Any]) -> EvaluateConfig:
    """`parse_config` for `skipwise evaluate`."""
    return parse_section(EvaluateConfig, values)


Parsed = TypeVar("Parsed", bound=Section)


def parse_section(cls: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """`parse_config` for any section."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines, codes = zip(*(_explain(dict(one), cls) for one in error.errors()), strict=True)
        code = codes[0] if len(set(codes)) == 1 else "several_mistakes"
        raise UserError(
            "The configuration is not valid:\n" + "\n".join(f"  - {line}" for line in lines), code=code
        ) from None


_TAGGED = {"positions": SAMPLERS, "rope": ROPE_SCALINGS, "evaluate": EVALUATIONS}


_HINTS = {
    "data": "Give --data PATH, or --data builtin:python for the Python documentation.",
    "lengths": "Give --target, e.g. --target 32k.",
    "context_lengths": "Give --lengths, e.g. --lengths 4k,8k.",
    "evaluator": "Give --set longppl.evaluator=MODEL.",
    "source": "Name a file, directory or hub dataset, e.g. --set question_answering.source=qa.jsonl.",
    "lengths.target": "Give --target, e.g. --target 32k.",
}


def _explain(error: dict[str, Any], cls: type[Section]) -> tuple[str, str]:
    """One line for one pydantic error (path, rule, value, nearest match), and its code."""
    location = [str(part) for part in error["loc"]]
    section = location[0] if location else ""
    tags = [name_of(choice) for choice in _TAGGED.get(section, ())]
    path = ".".join(part for part in location if part not in tags) or "configuration"
    value = error.get("input")
    hint = _HINTS.get(path) or _HINTS.get(location[-1] if location else "")
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            meant = _elsewhere(location, cls) or nearest(location[-1], _siblings(location, tags, cls))
            return f"{path}: unknown key.{meant}", "unknown_key"
        case "missing" | "missing_argument":
            return f"{path}: required, but not given.{f' {hint}' if hint else ''}", "missing_key"
        case "union_tag_invalid":
            tag = str(error["ctx"]["tag"])
            return f"{path}.name: {tag!r} is not known.{nearest(tag, tags)}", "unknown_choice"
        case "union_tag_not_found":
            return f"{path}: needs a name.{nearest('', tags)}", "missing_key"
        case "value_error":
            inner = error["ctx"]["error"]
            return f"{path}: {inner}", getattr(inner, "code", "invalid_value")
        case kind:
            code = "unknown_choice" if kind == "literal_error" else "wrong_type_or_range"
            return f"{path}: {error['msg']}, but it is {value!r}.", code


def _elsewhere(location: list[str], cls: type[Section]) -> str:
    """Where a key belongs that was given without its section, as `learning_rate` for `train.learning_rate`."""
    key = location[-1]
    fields = cls.model_fields.items() if len(location) == 1 else ()
    places = [section for section, field in fields if key in getattr(field.annotation, "model_fields", {})]
    return f" Did you mean {f'{places[0]}.{key}'!r}?" if len(places) == 1 else ""


def _siblings(location: list[str], tags: list[str], cls: type[Section]) -> list[str]:
    """The keys that exist where an unknown one was found."""
    for choice in _TAGGED.get(location[0], ()):
        if name_of(choice) in location:
            return list(choice.__dataclass_fields__)
    keys: Any = cls
    for part in location[:-1]:
        if part in getattr(keys, "model_fields", {}):
            keys = SourceConfig if part == "sources" else keys.model_fields[part].annotation
    return [
        *getattr(keys, "model_fields", tags),
        *(["source", "text_field", "split"] if keys in (DataConfig, DocumentsConfig) else []),
    ]


def to_yaml(config: RunConfig | EvaluateConfig) -> str:
    """The configuration as YAML that parses back to the same one."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
