"""What the doctor finds, what it mends, and what it leaves alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from skipwise import Lengths, UserError, YaRN, cli, set_rope_scaling
from skipwise.export.checkpoint import save_checkpoint
from skipwise.models.doctor import Diagnosis, diagnose
from skipwise.models.readers import READERS, difference, transformers_5
from tests.conftest import WINDOW, pico_llama

SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


def both_forms(rope: dict[str, Any], window: int, theta: float = 500000.0) -> dict[str, Any]:
    """A config with nothing wrong with it."""
    whole = {**rope, "rope_theta": theta}
    return {
        **SIZES,
        "max_position_embeddings": window,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else whole,
        "rope_parameters": whole,
    }


WELL = {
    "plain": both_forms({"rope_type": "default"}, 4096),
    "yarn": both_forms({**YARN, "attention_factor": 1.2079441541679836}, 32768),
    "linear": both_forms({"rope_type": "linear", "factor": 4.0}, 16384),
    "llama3": both_forms(
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, 131072,
    ),
}  # fmt: skip


def found(diagnosis: Diagnosis) -> str:
    return " ".join(finding.what for finding in diagnosis.findings)


@pytest.mark.parametrize("name", WELL)
def test_nothing_is_wrong_with_what_is_well(name: str) -> None:
    diagnosis = diagnose(WELL[name], {"tokenizer_config.json": {"model_max_length": 10**30}})
    assert diagnosis.findings == []
    assert difference(transformers_5(diagnosis.mended), transformers_5(WELL[name])) is None


SICK: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "theta lost": (
        {**SIZES, "max_position_embeddings": 32768, "rope_parameters": {**YARN, "rope_theta": 500000.0}},
        "transformers 4 reads something else",
        {"rope_theta": 500000.0},
    ),
    "poorer legacy form": (
        {**WELL["yarn"], "rope_scaling": {**YARN, "rope_theta": 500000.0},
         "rope_parameters": {**YARN, "rope_theta": 500000.0, "attention_factor": 1.5}},
        "rope_scaling, which wins, lacks attention_factor",
        {},
    ),
    "two thetas": ({**WELL["plain"], "rope_theta": 10000.0}, "two thetas", {"rope_theta": 500000.0}),
    "not raised": (both_forms(YARN, 4096), "either the former was not raised", {"max_position_embeddings": 32768}),
    "first window missing": (
        both_forms({"rope_type": "yarn", "factor": 8.0}, 32768), "takes? the extended window", {}
    ),
    "attention factor missing": (
        both_forms({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 4096,
                    "short_factor": [2.0] * 16, "long_factor": [2.0] * 16}, 32768),
        "llama.cpp reads something else",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_what_is_wrong_is_said_and_mended(name: str) -> None:
    config, what, changed = SICK[name]
    diagnosis = diagnose(config, {})
    assert re.search(what, found(diagnosis)), found(diagnosis)
    assert {key: diagnosis.mended[key] for key in changed} == changed
    again = diagnose(diagnosis.mended, {})
    assert [finding for finding in again.findings if finding.mended] == []
    for reader in ("transformers 4", "vLLM"):
        assert difference(READERS[reader](diagnosis.mended), transformers_5(diagnosis.mended)) is None


def test_the_first_window_can_be_said() -> None:
    """The numbers of a window that was not raised are those of a first window that was extended."""
    diagnosis = diagnose(both_forms({**YARN, "original_max_position_embeddings": 32768}, 32768), {}, original=4096)
    assert (diagnosis.original, diagnosis.current) == (4096, 32768)
    assert diagnosis.mended["rope_parameters"]["original_max_position_embeddings"] == 4096
    other = diagnose(both_forms(YARN, 20000), {})
    assert "is not the window of 20,000" in found(other) and not other.findings[0].mended
    assert diagnose(both_forms(YARN, 20000), {}, original=5000).mended["rope_parameters"]["factor"] == 4.0


def test_what_the_rope_parameters_have_lost_cannot_be_known() -> None:
    config = {**SIZES, "max_position_embeddings": 4096}
    diagnosis = diagnose(config, {})
    assert "no rope_theta" in found(diagnosis) and not diagnosis.findings[0].mended


def test_layers_are_listed() -> None:
    config = {**WELL["plain"], "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    assert "1 have no positions, and are left as they are: 3" in diagnose(config, {}).layers
    windowed = {**config, "sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    layers = diagnose(windowed, {}).layers
    assert layers[0] == "3 of 4 see only the last 128 tokens: 0, 1, 2"
    assert layers[1] == "1 see all of the text: 3"


@pytest.fixture
def extended(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model, lengths = pico_llama(), Lengths(original=WINDOW, train=WINDOW, target=8 * WINDOW)
    set_rope_scaling(model, YaRN(), lengths)
    save_checkpoint(model, tokenizer, tmp_path / "model", lengths, card="")
    return tmp_path / "model"


def doctor(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.run(lambda: cli.app(["doctor", *map(str, arguments), "--json"], standalone_mode=False))
    return code, json.loads(capsys.readouterr().out.splitlines()[0])


def test_what_we_write_is_well(extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(extended, "--target", "4k", capsys=capsys)
    assert code == 0 and said["findings"] == []
    assert said["probe"] == "attention reaches across a skip, and sees how far it is"
    assert "64 times its first window, the scaling it has being replaced" in said["target"]


def test_fix_writes_a_copy_that_is_well(extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((extended / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (extended / "config.json").write_text(json.dumps(config))
    limit = json.loads((extended / "tokenizer_config.json").read_text())
    (extended / "tokenizer_config.json").write_text(json.dumps({**limit, "model_max_length": WINDOW}))
    (extended / "generation_config.json").write_text(json.dumps({"max_length": WINDOW, "eos_token_id": 1}))
    code, said = doctor(extended, "--no-probe", capsys=capsys)
    assert code == 2 and len(said["findings"]) == 3
    mended = tmp_path / "mended"
    code, _ = doctor(extended, "--no-probe", "--fix", mended, capsys=capsys)
    assert code == 0
    code, said = doctor(mended, capsys=capsys)
    assert code == 0 and said["findings"] == []
    assert json.loads((mended / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert AutoModelForCausalLM.from_pretrained(mended).config.max_position_embeddings == 8 * WINDOW


def test_a_copy_goes_to_a_new_directory(extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = doctor(extended, "--no-probe", "--fix", extended, capsys=capsys)
    assert code == 2


def test_the_embedded_model_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = doctor("builtin:tiny", "--no-probe", capsys=capsys)
    assert code == 0


def test_models_without_rope_are_refused() -> None:
    with pytest.raises(UserError, match="ALiBi"):
        diagnose({"model_type": "bloom"}, {})
