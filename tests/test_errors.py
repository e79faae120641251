import ast
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import skipwise
from skipwise import UserError
from skipwise.config_files import parse_config
from skipwise.data.sources import MessagesError
from skipwise.models.readers import UnreadableError

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
