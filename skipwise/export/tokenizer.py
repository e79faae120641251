"""The files of a tokenizer, in a form that transformers 4 and 5 read alike."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from skipwise.runs import read_json, write_json


def tokenizer_for_all(directory: Path, window: int) -> None:
    """Rewrite a tokenizer's settings for readers of any version, in place; nothing where there are none.

    Args:
        directory: with a `tokenizer_config.json`.
        window: in tokens; becomes the limit at which inputs are cut.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = read_json(file)
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
    tokens = Tokenizer.from_file(str(file)).encode("a").tokens
    ends = {"add_bos_token": (tokens[:1], "bos_token"), "add_eos_token": (tokens[-1:], "eos_token")}
    return {key: token == [_text(settings.get(name))] for key, (token, name) in ends.items()}


def _text(token: Any) -> Any:
    """A special token, which may have flags about it."""
    return token["content"] if isinstance(token, dict) else token
