"""Names that come from elsewhere are text, and lead nowhere; nothing that is read can run code."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from skipwise.config.files import parse_section, read_yaml
from skipwise.errors import UserError
from skipwise.export.card import shown_name
from skipwise.report.tables import markdown_table, plain_table
from skipwise.runs.environment import describe_environment
from skipwise.study.config import StudyConfig, final_cells
from skipwise.training.engines import weights_only_checkpoints
from skipwise.workflows.evaluation_arguments import find_models
from tests.commands import error_code, skipwise

MARKUP = "[bold]x[-red]"
MEASURED = {
    "data": {"source": "builtin:python", "held_out_share": 0.05},
    "evaluate": [{"name": "passkey", "context_lengths": [64]}],
}


class Runs:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_names_that_look_like_markup_are_shown_as_they_are(
    pico_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    """Of a model, of a data file, in tables, messages and errors."""
    model, text = tmp_path / MARKUP, tmp_path / f"{MARKUP}.txt"
    shutil.copytree(pico_directory, model)
    shutil.copy(text_file, text)
    settings = ["--only", "passkey", "--lengths", "512", "--set", "passkey.trials=2", "--output", tmp_path / "out"]
    said = skipwise("evaluate", model, "--data", text, *settings).replace("\n", "")
    assert said.count(MARKUP) >= 2
    assert MARKUP in skipwise("evaluate", tmp_path / f"{MARKUP}[-nothing]", code=2).replace("\n", "")
    console = Console(record=True, width=80)
    console.print(plain_table(MARKUP, [MARKUP], [[MARKUP]]))
    assert console.export_text().count(MARKUP) == 3


def test_what_is_in_a_cell_of_a_table_stays_in_it() -> None:
    table = markdown_table(["method", "value"], [["a|b\nc <script> [x](y)", "1"]])
    assert table.splitlines()[-1] == "| a\\|b c \\<script\\> [x\\](y) | 1 |"


@pytest.mark.parametrize("name", ["..", "../..", ".hidden", "a/../../b", "\n", "/etc/passwd"])
def test_the_name_of_a_method_leads_nowhere(name: str, tmp_path: Path) -> None:
    """A cell's working directory is removed with all that is in it. Seen to be the whole study for '..'."""
    base = {"model": {"path": "builtin:tiny"}, "lengths": {"target": 512}, "data": MEASURED["data"]}
    methods = {"pose": "pose", name: "untouched", f"{name} ": "pose"}
    study = parse_section(StudyConfig, {"base": base, "methods": methods, "domains": {"a": MEASURED}})
    for cell in final_cells(study, {}):
        assert (tmp_path / cell.name).resolve().parent == tmp_path.resolve()
        assert (tmp_path / cell.name).resolve() != tmp_path.resolve()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", ""])
def test_the_name_of_a_domain_leads_nowhere(name: str) -> None:
    values = {"base": {}, "methods": {"pose": "pose"}, "domains": {name: MEASURED}}
    with pytest.raises(UserError, match="begins with a letter or digit"):
        parse_section(StudyConfig, values)


def test_the_name_of_a_model_leads_nowhere(pico_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = pico_directory / "inside"
    inside.mkdir(exist_ok=True)
    monkeypatch.chdir(inside)
    (found,) = find_models([".."])
    assert found.short == "model"


def test_a_configuration_is_data(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "config.yaml"
    file.write_text(f"model: !!python/object/apply:os.mkdir [{str(trace)!r}]\n")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        read_yaml(file)
    assert not trace.exists()


def test_checkpoints_of_any_engine_are_data(tmp_path: Path) -> None:
    """Also where the engine asks for more, as DeepSpeed does. Seen to run the code without the guard."""
    trace, file = tmp_path / "trace", tmp_path / "states.pt"
    torch.save({"optimizer": Runs(trace)}, file)
    with weights_only_checkpoints(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file, weights_only=False)
    assert not trace.exists()


def test_weights_are_not_unpickled(pico_directory: Path, text_file: Path, tmp_path: Path) -> None:
    """Old `.bin` weights are not read at all."""
    trace, model = tmp_path / "trace", tmp_path / "model"
    shutil.copytree(pico_directory, model)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    (model / "model.safetensors").unlink()
    torch.save({**weights, "more": Runs(trace)}, model / "pytorch_model.bin")
    settings = ["--data", text_file, "--only", "passkey", "--lengths", "512", "--output", tmp_path / "out"]
    assert error_code(skipwise("evaluate", model, *settings, code=2)) == "weights_are_pickles"
    assert not trace.exists()


def test_code_of_a_model_runs_only_when_asked_for(pico_directory: Path, text_file: Path, tmp_path: Path) -> None:
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(pico_directory, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    settings = ["--data", text_file, "--only", "passkey", "--lengths", "512", "--output", tmp_path / "out"]
    skipwise("evaluate", model, *settings, code=2)
    assert not trace.exists()
    skipwise("evaluate", model, *settings, "--set", "trust_remote_code=true", code=2)  # there is no model in it
    assert trace.exists()


def test_the_environment_has_no_secrets_and_no_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisasecret")
    arguments = [
        str(tmp_path / "config.yaml"),
        f"--output={tmp_path}/some one/run/",
        "--set",
        f"model.path={tmp_path}/model",
    ]
    monkeypatch.setattr("sys.argv", ["skipwise", "extend", *arguments])
    reporting = json.dumps(describe_environment())
    assert "hf_thisisasecret" not in reporting
    assert str(tmp_path) not in reporting and "some one" not in reporting
    assert "--output=run" in reporting


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("org/model-7b", "org/model-7b"),
        ("a\n---\nb: [x](javascript:y)", "a-----b: -x-javascript:y-"),
        ("`<b>`", "-b-"),
    ],
)
def test_names_in_model_cards(path: str, shown: str) -> None:
    assert shown_name(path) == shown
