import ast
import errno
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import skipwise
from skipwise import UserError
from skipwise.cli import main as cli
from skipwise.config.files import parse_config
from skipwise.data.sources import MessagesError
from skipwise.export.readers import UnreadableError
from tests.commands import error_code
from tests.commands import skipwise as command

CODE = re.compile(r"[a-z]+(_[a-z0-9]+){1,5}")
ERRORS = (UserError, MessagesError, UnreadableError)
GOOD: dict[str, Any] = {"model": {"path": "builtin:tiny"}, "lengths": {"target": 512}, "data": "builtin:python"}


def has_code(call: ast.Call) -> bool:
    """Whether a call gives a literal code that is well formed, or passes one on."""
    match next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None):
        case ast.Constant(value=str(code)):
            return CODE.fullmatch(code) is not None
        case value:
            return isinstance(value, ast.Attribute | ast.Name | ast.Call)


def test_every_call_has_a_code() -> None:
    names = {cls.__name__ for cls in ERRORS}
    without, found = [], 0
    for file in sorted(Path(skipwise.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in names:
                found += 1
                without += [] if has_code(node) else [f"{file}:{node.lineno}"]
    assert found > 200 and without == []


@pytest.mark.parametrize("cls", ERRORS)
def test_pickling_keeps_message_and_code(cls: type[UserError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("a message", code="some_rule")))
    assert (type(copy), str(copy), copy.code) == (cls, "a message", "some_rule")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"trian": {}}, "unknown_key"),
        ({"trian": {}, "evalute": []}, "unknown_key"),
        ({"lengths": {}}, "missing_key"),
        ({"positions": {"name": "poze"}}, "unknown_choice"),
        ({"train": {"max_steps": "many"}}, "wrong_type_or_range"),
        ({"rope": {"name": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}}, "betas_out_of_order"),
        ({"trian": {}, "positions": {"name": "poze"}}, "several_mistakes"),
    ],
)
def test_mistakes_in_a_configuration_have_codes(changes: dict[str, Any], code: str) -> None:
    parse_config(GOOD)
    with pytest.raises(UserError) as caught:
        parse_config({**GOOD, **changes})
    assert caught.value.code == code


OUTPUTS = ["file/run", "n" * 300, "/proc/run", "."]
EVALUATE = ["evaluate", "builtin:tiny", "--only", "passkey", "--lengths", "64", "--set", "passkey.trials=1"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "arguments",
    [["extend", "builtin:tiny", "--target", "4k", "--data", "builtin:python"], EVALUATE],
    ids=lambda a: a[0],
)
def test_an_output_that_cannot_be_written_is_one_message(
    arguments: list[str], output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, with a name too long, where the system takes no files, in a directory of something else."""
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    printed = command(*arguments, "--output", output, code=2)
    assert error_code(printed) == ("output_kind_mismatch" if output == "." else "path_not_usable")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [["doctor", "LONG"], ["plan", "LONG", "--target", "4k"], ["report", "LONG"], ["evaluate", "LONG"],
     ["extend", "builtin:tiny", "--target", "4k", "--data", "LONG"]],
    ids=lambda a: a[0],
)  # fmt: skip
def test_a_path_that_cannot_exist_is_one_message(arguments: list[str], tmp_path: Path) -> None:
    given = [str(tmp_path / ("n" * 300)) if argument == "LONG" else argument for argument in arguments]
    assert error_code(command(*given, code=2)) == "path_not_usable"


@pytest.mark.parametrize(
    ("number", "filename", "code"),
    [
        (errno.ENOSPC, None, "disk_full"),
        (errno.EDQUOT, "/data/x", "disk_full"),
        (errno.EROFS, "/data/x", "path_not_usable"),
        (errno.EACCES, b"/data/x", "path_not_usable"),
        (errno.EMFILE, None, "path_not_usable"),
        (errno.EISDIR, "/data/x", "path_not_usable"),
        (errno.ECONNREFUSED, None, None),
        (errno.ENOENT, str(Path(skipwise.__file__).with_name("gone.json")), None),
    ],
)
def test_conditions_of_a_machine(
    number: int, filename: str | None, code: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not those of a network, and not files of our own that are missing."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), filename)

    assert cli.run(fail) == (1 if code is None else 2)
    printed = capsys.readouterr().err
    assert (f"[{code}]" in printed) == (code is not None)


def test_a_disk_that_is_full_while_weights_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors has an error of its own for it, which is none of the system's."""
    from safetensors import SafetensorError

    def fail() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert cli.run(fail) == 2
    assert "[disk_full]" in capsys.readouterr().err


DAMAGED = {
    "report": ("plan.json", "environment.json", "rope.json", "timings.json", "results.jsonl"),
    "extend": ("plan.json", "data.json", "parts.json"),
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in DAMAGED.items() for file in files])
def test_a_damaged_file_of_a_run_is_one_message(name: str, file: str, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("extend", config_file, "--output", run, "--set", "train.max_steps=1", "--set", "evaluate=[]")
    for content in ('{"a": ', "[1, 2]", '{"unknown": 1}\n' if file.endswith("jsonl") else "\xff"):
        (run / file).write_bytes(content.encode("latin-1") + b"\n")
        arguments = ["report", run] if name == "report" else ["extend", config_file, "--output", run, "--resume"]
        arguments += [] if name == "report" else ["--set", "train.max_steps=1", "--set", "evaluate=[]"]
        assert error_code(command(*arguments, code=2)) in ("damaged_file", "damaged_line"), (file, content)
