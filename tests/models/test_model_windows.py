"""Both windows of a model from single keys of published configs, and where they can be read in two ways."""

from typing import Any

import pytest

from skipwise import UserError
from skipwise.models.windows import windows_of

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def config(window: int | None, rope: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "max_position_embeddings": window, "rope_scaling": rope, **more}


# Of published models: their keys, and what they were trained with, before and after an extension.
KNOWN: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "Llama 2": (config(4096), (4096, 4096)),
    "Llama 3.1, whose factor is 8 of 16": (config(131072, {**LLAMA3, "factor": 8.0}), (8192, 131072)),
    "Llama 3.2, whose factor is 32 of 16": (config(131072, LLAMA3), (8192, 131072)),
    "Llama-2-7B-32K, linear, raised": (config(32768, {"type": "linear", "factor": 8.0}), (4096, 32768)),
    "Vicuna 16k, linear, not raised": (
        config(4096, {"type": "linear", "factor": 4.0}, max_sequence_length=16384), (4096, 16384),
    ),
    "DeepSeek Coder, linear, raised": (config(16384, {"type": "linear", "factor": 4.0}), (4096, 16384)),
    "Gemma 3 4B, linear, original known": (
        config(131072, {"rope_type": "linear", "factor": 8.0}, model_type="gemma3_text"), (32768, 131072),
    ),
    "Command R, another key": (config(8192, model_type="cohere", model_max_length=131072), (131072, 131072)),
    "Yarn-Llama-2-128k": (
        config(131072, {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}), (4096, 131072),
    ),
    "Qwen2.5 with YaRN, not raised": (
        config(32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}), (32768, 131072),
    ),
    "Qwen3 with YaRN, a window above the original": (
        config(40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}), (32768, 131072),
    ),
    "Qwen2.5-1M, dual chunks": (
        config(1010000, dual_chunk_attention_config={"original_max_position_embeddings": 262144}), (262144, 1010000),
    ),
    "Phi-3.5, original beside": (
        config(131072, {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
               original_max_position_embeddings=4096), (4096, 131072),
    ),
    "GPT-J, older key": ({"model_type": "gptj", "n_positions": 2048}, (2048, 2048)),
    "nested tables": (
        config(65536, None, rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 8.0,
               "original_max_position_embeddings": 8192}, "sliding_attention": {"rope_type": "default"}}),
        (8192, 65536),
    ),
    "ours, linear": (config(4096, {"rope_type": "linear", "factor": 16.0}, max_sequence_length=4096), (256, 4096)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_windows_of_published_models(name: str) -> None:
    keys, wanted = KNOWN[name]
    found = windows_of(keys)
    assert (found.original, found.current, found.ambiguity) == (*wanted, None)


LONG_ALPACA = config(4096, {"type": "linear", "factor": 8.0})
YARN_WITHOUT_ORIGINAL = config(131072, {"rope_type": "yarn", "factor": 4.0})


@pytest.mark.parametrize("keys", [LONG_ALPACA, YARN_WITHOUT_ORIGINAL], ids=["linear", "yarn"])
def test_what_can_be_read_in_two_ways_is_asked_for(keys: dict[str, Any]) -> None:
    claimed, factor = keys["max_position_embeddings"], keys["rope_scaling"]["factor"]
    found = windows_of(keys)
    assert found.ambiguity is not None
    for reading in (claimed, claimed * factor, claimed / factor):
        assert f"{reading:,.0f}" in found.ambiguity
    with pytest.raises(UserError) as caught:
        found.certain("a model")
    assert caught.value.code == "window_ambiguous"
    for original, current in ((claimed, claimed * factor), (claimed / factor, claimed)):
        said = windows_of(keys, original=int(original))
        assert (said.original, said.current, said.ambiguity) == (original, current, None)


def test_other_files_and_keys_decide() -> None:
    """A limit of the extended window says that the config's was left; one that was left as well says nothing."""
    assert windows_of(LONG_ALPACA, tokenizer_limit=32768).current == 32768
    assert windows_of(LONG_ALPACA, tokenizer_limit=4096).ambiguity is not None
    assert windows_of(YARN_WITHOUT_ORIGINAL, tokenizer_limit=524288).original == 131072
    said = windows_of({**YARN_WITHOUT_ORIGINAL, "max_sequence_length": 131072})
    assert (said.original, said.current) == (32768, 131072)


def test_what_the_class_fills_in_is_not_what_the_file_says() -> None:
    """transformers takes the window for the original one where a YaRN config has none."""
    rope = {**YARN_WITHOUT_ORIGINAL["rope_scaling"], "original_max_position_embeddings": 131072}
    completed = {**YARN_WITHOUT_ORIGINAL, "rope_scaling": rope}
    assert windows_of(completed, YARN_WITHOUT_ORIGINAL).ambiguity is not None
    assert windows_of(completed).ambiguity is None


def test_what_the_user_says_goes_before_the_file() -> None:
    wrong = config(32768, {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32768})
    said = windows_of(wrong, original=4096)
    assert (said.original, said.current) == (4096, 32768)


def test_a_config_without_a_window() -> None:
    with pytest.raises(UserError) as caught:
        windows_of({"model_type": "llama"})
    assert caught.value.code == "model_window_missing"
