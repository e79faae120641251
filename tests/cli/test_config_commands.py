"""What editors and newcomers get."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from skipwise import UserError
from skipwise.axolotl import Settings
from skipwise.cli import main as cli
from skipwise.cli.config_commands import STARTER, schema_of
from skipwise.config.files import parse_config, parse_evaluate_config, parse_section

ROOT = Path(__file__).parents[2]
RUNS = [ROOT / "configs/smollm2-32k.yaml", ROOT / "configs/smollm2-128k.yaml", ROOT / "skipwise/workflows/demo.yaml"]
RUNS += sorted((ROOT / "configs/paper").glob("*.yaml"))


def errors(values: Any, kind: str = "run") -> list[str]:
    return [error.message for error in Draft202012Validator(schema_of(kind)).iter_errors(values)]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.name)
def test_our_own_files_fit_the_schema(file: Path) -> None:
    assert errors(yaml.safe_load(file.read_text())) == []


@pytest.mark.parametrize(("kind", "directory"), [("evaluate", "evaluate"), ("study", "studies")])
def test_files_of_other_commands_fit_theirs(kind: str, directory: str) -> None:
    files = sorted((ROOT / "configs" / directory).glob("*.yaml"))
    assert files
    for file in files:
        values = yaml.safe_load(file.read_text())
        assert errors(values, kind) == [], file.name
        assert errors({**values, "sed": 1}, kind) != []
    with pytest.raises(UserError, match="Did you mean 'study'"):
        schema_of("studies")


def test_configurations_on_the_pages_are_taken(tmp_path: Path) -> None:
    """A run fits the schema as well; studies are run by tests/test_docs.py."""
    kinds = Counter[str]()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            values = yaml.safe_load(block)
            if "model" in values:
                assert errors(values) == []
                parse_config(values)
                kinds["run"] += 1
            elif "evaluate" in values:
                parse_evaluate_config(values)
                kinds["evaluate"] += 1
            elif "skipwise" in values:
                parse_section(Settings, values["skipwise"])
                kinds["axolotl"] += 1
            else:
                assert set(values) >= {"base", "methods"}, page
                kinds["study"] += 1
    assert set(kinds) == {"run", "evaluate", "axolotl", "study"}


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"path": "x"}, "lengths": {"target": "32k"}, "data": "docs.jsonl", "rope": "linear"},
        {"model": {"path": "x"}, "lengths": {"target": 4096}, "data": {"source": "a.jsonl", "messages_field": "m"}},
        {"model": {"path": "x"}, "lengths": {"target": 4096}, "data": {"sources": ["a", {"source": "b", "weight": 2}]}},
    ],
)
def test_shorthands_fit_it_and_are_taken(values: dict[str, Any]) -> None:
    assert errors(values) == []
    parse_config(values)


@pytest.mark.parametrize(
    "values",
    [
        {"lengths": {"target": "32k"}, "data": "x"},
        {"model": {"path": "x"}, "lengths": {"target": "32k"}, "data": "x", "trian": {}},
        {"model": {"path": "x"}, "lengths": {"target": "32k"}, "data": "x", "train": {"max_steps": -1}},
        {"model": {"path": "x"}, "lengths": {"target": "32k"}, "data": "x", "rope": {"name": "yarn", "beta": 1}},
    ],
)
def test_mistakes_do_not_fit_it(values: dict[str, Any]) -> None:
    assert errors(values)


def test_the_starter_is_a_configuration_of_defaults() -> None:
    values = yaml.safe_load(STARTER)
    assert errors(values) == []
    config = parse_config(values)
    least = parse_config({key: values[key] for key in ("model", "lengths", "data", "evaluate")})
    assert config == least  # nothing in it is other than what one gets without
    uncommented = re.sub(r"^(\s*)# (?=[-\w]+[:\s])", r"\1", STARTER.split("\n", 1)[1], flags=re.MULTILINE)
    assert parse_config(yaml.safe_load(uncommented))


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: cli.app(["config", "schema"], standalone_mode=False)) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"
    assert cli.run(lambda: cli.app(["config", "init"], standalone_mode=False)) == 0
    assert capsys.readouterr().out == STARTER


def test_what_is_commented_out_has_the_value_of_the_default() -> None:
    """Read as it is, and with those lines."""
    taken, lines = re.subn(r"^( +)# (?=\w+: [\w.]+( |$))", r"\1", STARTER, flags=re.MULTILINE)
    assert lines > 8
    without, with_them = (parse_config(yaml.safe_load(text)).model_dump() for text in (STARTER, taken))
    no_default = {("train", "kl_weight"), ("lengths", "train"), ("model", "attn_implementation")}  # as the comments say
    for section, own in with_them.items():
        for key, value in own.items() if isinstance(own, dict) else []:
            if (section, key) not in no_default:
                assert without[section][key] == value, f"{section}.{key}"
