"""Every command line, option and key that Skipwise prints is one that it takes. (Lines of the pages: test_docs.py.)"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
from pydantic import BaseModel

from skipwise.cli.main import app
from skipwise.config.run import EvaluateConfig, RunConfig
from skipwise.study.config import StudyConfig
from tests.commands import error_code, skipwise
from tests.picomodels import SMALL_LLAMA, write_config

PACKAGE = Path(__file__).parent.parent / "skipwise"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Options of programs that are not ours, by which a message names one.
OTHERS = {"--max-model-len", "--nproc-per-node", "--nproc_per_node", "--num_gpus", "--outtype", "--outfile", "--module"}
# Words behind the name of the plugin where it is the subject of a sentence.
VERBS = {"is", "was", "and", "needs", "does", "has", "or", "with", "in", "to", "it"}


def printed() -> Iterator[tuple[str, str]]:
    """Where, and the text of every string that is no docstring; what is filled in stands as N."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "N" for part in node.values]
                yield f"{path.name}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
                yield f"{path.name}:{node.lineno}", node.value


STRINGS = list(printed())


def options_of(command: click.Command) -> set[str]:
    below = [options_of(one) for one in getattr(command, "commands", {}).values()]
    return {option for own in command.params for option in (*own.opts, *own.secondary_opts)}.union(*below, {"--help"})


ALL_OPTIONS = set().union(*(options_of(command) for command in COMMANDS.values())) | {"--version", "--quiet", "--debug"}


def test_the_strings_are_found() -> None:
    text = "\n".join(string for _, string in STRINGS)
    assert len(STRINGS) > 2000 and "--original" in text and "skipwise convert gptj" in text


def test_every_command_that_is_named_exists() -> None:
    named = [(place, name) for place, text in STRINGS for name in re.findall(r"\bskipwise ([a-z]+)\b", text)]
    assert [one for one in named if one[1] not in COMMANDS and one[1] not in VERBS] == []
    assert len([one for one in named if one[1] in COMMANDS]) > 10


def test_every_option_that_is_named_exists() -> None:
    named = {(place, option) for place, text in STRINGS for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)}
    known = ALL_OPTIONS | OTHERS
    assert sorted(one for one in named if one[1] not in known and "vllm" not in one[0]) == []


def sections(model: Any) -> Iterator[type]:
    """Every section that a field may hold."""
    for argument in (model, *get_args(model)):
        if isinstance(argument, type) and (
            issubclass(argument, BaseModel) or hasattr(argument, "__dataclass_fields__")
        ):
            yield argument
        elif argument is not model:
            yield from sections(argument)


def keys_of(section: type) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    import typing

    return typing.get_type_hints(section)


def has_key(section: type, key: list[str]) -> bool:
    fields = keys_of(section)
    if key[0] not in fields:
        return False
    return len(key) == 1 or any(has_key(inner, key[1:]) for inner in sections(fields[key[0]]))


def test_every_key_that_is_named_exists() -> None:
    """Keys of a configuration that messages tell to set: `train.kl_weight=0`, `--set model.trust_remote_code=true`."""
    roots = (RunConfig, EvaluateConfig, StudyConfig)
    first = {name for root in roots for name in root.model_fields}
    named = {
        (place, key)
        for place, text in STRINGS
        for key in re.findall(r"(?<![\w./])((?:[a-z_]+\.)+[a-z_0-9]+)=", text)
        if key.split(".")[0] in first
    }
    assert len(named) > 10
    assert sorted(one for one in named if not any(has_key(root, one[1].split(".")) for root in roots)) == []


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL_LLAMA, "model_type": "llama"},
    "Llama 3.2": {
        **SMALL_LLAMA, "model_type": "llama", "max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
    "Vicuna": {
        **SMALL_LLAMA, "model_type": "llama", "max_sequence_length": 16384, "rope_scaling": {
            "type": "linear", "factor": 4.0}},
    "Qwen2.5 with YaRN": {
        **SMALL_LLAMA, "model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "Mistral": {**SMALL_LLAMA, "model_type": "mistral", "sliding_window": 1024},
    "mixture": {**SMALL_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_doctor_proposes_extend_takes(name: str, tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", SHAPES[name])
    wrong = {"Vicuna", "Qwen2.5 with YaRN"}  # whose window was not raised
    said = skipwise("doctor", model, "--target", "1m", "--json", code=2 if name in wrong else 0)
    proposal = json.loads(said[: said.rindex("}") + 1])["target"]
    command = shlex.split(re.search(r"skipwise (extend .*--data) \.\.\.", proposal)[1])  # type: ignore[index]
    assert "factor" in skipwise(*command, "builtin:python", "--output", tmp_path / "run", "--dry-run")


@pytest.mark.parametrize("name", SHAPES)
def test_the_target_that_an_error_proposes_is_taken(name: str, tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", SHAPES[name])
    said = skipwise("plan", model, "--target", "4k", code=2)
    assert error_code(said) == "target_not_above_window"
    target = re.search(r"for example to ([\d,]+)", " ".join(said.split()))[1].replace(",", "")  # type: ignore[index]
    skipwise("plan", model, "--target", target)
