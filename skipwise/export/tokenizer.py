"""The files of a tokenizer, in a form that transformers 4 and 5 read alike."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from skipwise.errors import UserError
from skipwise.utils.files import write_json


def tokenizer_for_all(directory: Path, window: int) -> None:
    """Rewrite a tokenizer's settings for readers of any version, in place; nothing where there are none.

    Args:
        directory: with a `tokenizer_config.json`.
        window: in tokens; becomes the limit at which inputs are cut.

    Raises:
        UserError: when its files cannot be read.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = _settings(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":  # which transformers 4 has not
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # where transformers 4 wants a dictionary
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(file, {**_added_tokens(directory, settings), **settings, "model_max_length": window})


def _added_tokens(directory: Path, settings: dict[str, Any]) -> dict[str, bool]:
    """Which tokens a tokenizer puts around a text.

    transformers 5 leaves that to `tokenizer.json`, where the classes of transformers 4 do not look: that of Llama
    begins every text with a token unless its settings say that it must not.
    """
    file = directory / "tokenizer.json"
    if settings.get("tokenizer_class") == "PreTrainedTokenizerFast" or not file.is_file():
        return {}
    try:
        tokens = Tokenizer.from_file(str(file)).encode("a").tokens
    except Exception as error:  # the library has no class of its own for it
        raise _not_readable(file, error) from error
    ends = {"add_bos_token": (tokens[:1], "bos_token"), "add_eos_token": (tokens[-1:], "eos_token")}
    return {key: token == [_text(settings.get(name))] for key, (token, name) in ends.items()}


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise _not_readable(file, error) from error
    if not isinstance(settings, dict):
        raise _not_readable(file, f"it holds {type(settings).__name__}, not an object")
    return settings


def _not_readable(file: Path, why: object) -> UserError:
    return UserError(
        f"The {file.name} of a model must be readable, but is not: {why}. Download it again.",
        code="tokenizer_not_readable",
    )


def _text(token: Any) -> Any:
    """A special token, which may have flags about it."""
    return token["content"] if isinstance(token, dict) else token
