"""What the doctor finds, what it fixes, and what it leaves alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from skipwise import Lengths, UserError, YaRN, set_rope_scaling
from skipwise.cli import main as cli
from skipwise.export.checkpoint import save_checkpoint
from skipwise.export.doctor import Diagnosis, diagnose, fixed_copy
from skipwise.export.readers import READERS, Reading, difference, transformers_5
from skipwise.models.rope import is_rotary_table, live_rope
from tests.picomodels import WINDOW, pico_llama

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
    assert difference(transformers_5(diagnosis.fixed), transformers_5(WELL[name])) is None


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
    "not raised": (
        both_forms(YARN, 4096), "makes 32,768 of 4,096",
        {"max_position_embeddings": 32768},
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
    assert {key: diagnosis.fixed[key] for key in changed} == changed
    again = diagnose(diagnosis.fixed, {})
    assert [finding for finding in again.findings if finding.fixed] == []
    for reader in ("transformers 4", "vLLM"):
        assert difference(READERS[reader](diagnosis.fixed), transformers_5(diagnosis.fixed)) is None


def test_an_original_window_that_is_lost_is_asked_for() -> None:
    """Written as a quarter of the window, it made frequencies 2.5 times those of all readers, and nothing was wrong."""
    lost = both_forms({"rope_type": "yarn", "factor": 8.0}, 32768)
    (finding,) = diagnose(lost, {}).findings
    assert not finding.fixed and "--original 32768" in finding.what and "--original 4096" in finding.what
    said = diagnose(lost, {}, original=4096)
    assert (said.original, said.current) == (4096, 32768)
    assert said.fixed["rope_parameters"]["original_max_position_embeddings"] == 4096
    assert diagnose(said.fixed, {}).findings == []
    other = diagnose(lost, {}, original=32768)
    assert (other.original, other.current) == (32768, 262144)
    assert difference(transformers_5(other.fixed), transformers_5(lost)) is None


@pytest.mark.parametrize("top", ["qwen2_5_vl", "qwen2_vl"])
def test_a_repair_leaves_what_it_does_not_understand(top: str) -> None:
    """These keep the keys of their text model at the top, where its type was written."""
    config = {**SIZES, "model_type": top, "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 300,
              "max_position_embeddings": 4096, "rope_theta": 1e6,
              "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}  # fmt: skip
    diagnosis = diagnose(config, {})
    assert diagnosis.fixed == config and diagnosis.findings == []


def test_a_repair_that_would_be_another_model_is_not_written(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**SIZES, "max_position_embeddings": 4096}))
    found = diagnose(both_forms(YARN, 4096), {})
    found.fixed["model_type"] = "qwen2"
    with pytest.raises(UserError) as caught:
        fixed_copy(model, found, {}, tmp_path / "copy")
    assert caught.value.code == "repair_changes_model" and not (tmp_path / "copy").exists()


def test_a_reader_without_the_model_is_nothing_wrong() -> None:
    """transformers 4 has no ministral3; vLLM and llama.cpp were not looked at for it."""
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    config = {**SIZES, "model_type": "ministral3", "head_dim": 32, "max_position_embeddings": 32768,
              "rope_parameters": rope}  # fmt: skip
    diagnosis = diagnose(config, {})
    assert diagnosis.findings == []
    assert list(diagnosis.readings) == ["transformers 5", "transformers 4"]
    assert isinstance(diagnosis.readings["transformers 4"], UserError)


def test_llama_cpp_takes_the_other_key_of_command_r() -> None:
    """vLLM and transformers take 8,192."""
    config = {**SIZES, "model_type": "cohere", "max_position_embeddings": 8192, "model_max_length": 131072}
    diagnosis = diagnose(config, {})
    assert (diagnosis.original, diagnosis.current) == (131072, 131072)
    windows = {name: read.window for name, read in diagnosis.readings.items() if isinstance(read, Reading)}
    assert windows["llama.cpp"] == 131072 and windows["transformers 5"] == 8192


def test_readers_that_go_wrong_alike_are_one_finding() -> None:
    """One cause was a complaint for every reader."""
    diagnosis = diagnose(both_forms({"rope_type": "yarn", "factor": 8.0}, 32768), {}, original=4096)
    about = [finding.what for finding in diagnosis.findings if "something else" in finding.what]
    (one,) = about
    assert one.startswith("transformers 5, transformers 4, vLLM, llama.cpp read something else: frequencies up to ")


def test_what_still_is_wrong_after_a_fix_is_said(
    extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((extended / "config.json").read_text())
    config |= both_forms(YARN, 40000)
    (extended / "config.json").write_text(json.dumps(config))
    arguments = ["doctor", str(extended), "--no-probe", "--fix", str(tmp_path / "mended")]
    assert cli.run(lambda: cli.app(arguments, standalone_mode=False)) == 2
    said = capsys.readouterr()
    assert "Still wrong with it:\n- A factor of 8 times" in said.out
    assert "mended is not valid either" in " ".join(said.err.split()) and "--fix" not in said.err


def test_the_first_window_can_be_said() -> None:
    """The numbers of a window that was not raised are those of a original window that was extended."""
    diagnosis = diagnose(both_forms({**YARN, "original_max_position_embeddings": 32768}, 32768), {}, original=4096)
    assert (diagnosis.original, diagnosis.current) == (4096, 32768)
    assert diagnosis.fixed["rope_parameters"]["original_max_position_embeddings"] == 4096
    assert diagnosis.fixed["rope_parameters"]["factor"] == 8.0
    other = diagnose(both_forms(YARN, 40000), {})
    assert "is not the window of 40,000" in found(other) and not other.findings[0].fixed
    assert diagnose(both_forms(YARN, 40000), {}, original=5000).current == 40000


# Shapes of published configs, in the form they have on hubs: nothing is wrong with any of them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 2": {**SIZES, "max_position_embeddings": 4096},
    "llama 3.1": {
        **SIZES, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}},
    "mixtral": {**SIZES, "model_type": "mixtral", "max_position_embeddings": 32768, "rope_theta": 1e6},
    "gemma 2": {**SIZES, "model_type": "gemma2", "head_dim": 32, "sliding_window": 4096, "rope_theta": 10000.0},
    "gemma 3": {
        **SIZES, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 32, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 131072},
    "gemma 3, multimodal": {
        "model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {
            **SIZES, "model_type": "gemma3_text", "head_dim": 32,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
    "olmo 3": {
        **SIZES, "model_type": "olmo3", "rope_theta": 500000.0, "max_position_embeddings": 65536, "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn"},
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096},
    "phi 3 4k": {
        **SIZES, "model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "rope_scaling": None, "rope_theta": 10000.0, "pad_token_id": 0},
    "gpt-neox": {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000,
                 "max_position_embeddings": 2048},
    "stablelm": {**SIZES, "model_type": "stablelm", "partial_rotary_factor": 0.25, "max_position_embeddings": 4096},
    "phi 2": {**SIZES, "model_type": "phi", "partial_rotary_factor": 0.4, "max_position_embeddings": 2048},
    "modernbert": {
        **SIZES, "model_type": "modernbert-decoder", "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192},
}  # fmt: skip
PHI3_LONG = {
    **SIZES, "model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, "pad_token_id": 0,
}  # fmt: skip


def tables(config: dict[str, Any], path: Path) -> list[Any]:
    """What Hugging Face code computes from a file, for every kind of layer."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(path).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read)
    kept = [name for name, _ in model.named_buffers() if name.endswith("inv_freq")]
    rotary = next(module for module in model.modules() if is_rotary_table(module))
    again = type(rotary)(config=read)
    assert kept
    return [value for name, value in sorted(again.named_buffers()) if name.endswith("inv_freq")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_well_but_for_what_llama_cpp_leaves_out(name: str) -> None:
    diagnosis = diagnose(PUBLISHED[name], {})
    assert [finding.what for finding in diagnosis.findings if not finding.limit] == []


@pytest.mark.parametrize("name", [*PUBLISHED, "phi 3 long"])
def test_what_is_mended_computes_the_same(name: str, tmp_path: Path) -> None:
    """By Hugging Face code, before and after, in every kind of layer. Seen to fail when tables were not nested."""
    config = {**PUBLISHED, "phi 3 long": PHI3_LONG}[name]
    before = tables(config, tmp_path / "before")
    after = tables(diagnose(config, {}).fixed, tmp_path / "after")
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    again = diagnose(diagnose(config, {}).fixed, {})
    assert [finding.what for finding in again.findings if finding.fixed] == []


def test_deepseek_keeps_what_vllm_takes_for_a_sign() -> None:
    """With an attention factor of 1 vLLM would not scale its softmax."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    config = {**SIZES, "model_type": "deepseek_v3", "max_position_embeddings": 163840, "rope_scaling": yarn}
    assert "attention_factor" not in diagnose(config, {}).fixed["rope_parameters"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "does not know"),
        ({"model_type": "llama", "max_position_embeddings": "8k"}, "field 'max_position_embeddings'"),
        ({"model_type": "llama", "rope_scaling": [1]}, "field 'rope_parameters'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 0}}, "no numbers above 0"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": "4x"}}, "could not convert"),
        ({"model_type": "llama", "rope_scaling": {"type": "unheard"}}, "is not known"),
        ({"model_type": "llama", "num_attention_heads": 0}, "by zero"),
        ({"model_type": "bert"}, "learned"),
    ],
)
def test_strange_files_give_one_message(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diagnose(config, {})


@pytest.mark.parametrize(
    "config",
    [{"model_type": "gemma3", "text_config": None}, {"model_type": "llava", "text_config": {"model_type": "llama"}}],
)
def test_a_language_model_by_its_defaults_is_well(config: dict[str, Any]) -> None:
    """Gemma's near table was taken for another one, its older names being those of the language model."""
    assert diagnose(config, {}).findings == []


def test_layers_are_listed() -> None:
    assert diagnose(PUBLISHED["gemma 3"], {}).layers == ["5 of 6 see only the last 512 tokens: 0, 1, 2, 3, 4",
                                                         "1 of 6 see all of the text: 5"]  # fmt: skip
    assert diagnose(PUBLISHED["gemma 2"], {}).layers[0].startswith("1 of 2 see only")
    config = {**WELL["plain"], "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    assert "1 have no positions, and are left as they are: 3" in diagnose(config, {}).layers
    windowed = {**config, "sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    layers = diagnose(windowed, {}).layers
    assert layers[0] == "3 of 4 see only the last 128 tokens: 0, 1, 2"
    assert layers[1] == "1 of 4 see all of the text: 3"


def test_an_encoder_is_well() -> None:
    """Its older names were not looked for, and its windowed layers taken for ones that see far."""
    diagnosis = diagnose(AutoConfig.for_model("modernbert", num_hidden_layers=4).to_dict(), {})
    assert diagnosis.family.startswith("modernbert: ModernBERT")
    assert diagnosis.layers[0] == "2 of 4 see only 64 tokens to each side: 1, 2"
    assert diagnosis.findings == [] and set(diagnosis.readings) == {"transformers 5", "transformers 4"}


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
    assert "64 times its original window, the scaling it has being replaced" in said["target"]


def test_fix_writes_a_copy_that_is_well(extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((extended / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (extended / "config.json").write_text(json.dumps(config))
    limit = json.loads((extended / "tokenizer_config.json").read_text())
    (extended / "tokenizer_config.json").write_text(json.dumps({**limit, "model_max_length": WINDOW}))
    (extended / "generation_config.json").write_text(json.dumps({"max_length": WINDOW, "eos_token_id": 1}))
    code, said = doctor(extended, "--no-probe", capsys=capsys)
    assert code == 2 and len(said["findings"]) == 3
    fixed = tmp_path / "mended"
    code = cli.run(lambda: cli.app(["doctor", str(extended), "--no-probe", "--fix", str(fixed)], standalone_mode=False))
    assert code == 0 and "A second look at it finds nothing wrong" in capsys.readouterr().out
    code, said = doctor(fixed, capsys=capsys)
    assert code == 0 and said["findings"] == []
    assert json.loads((fixed / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert AutoModelForCausalLM.from_pretrained(fixed).config.max_position_embeddings == 8 * WINDOW


def test_in_a_run_it_is_compared_with_what_was_trained(
    extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its scaling a config is one of a longer window, and nothing in it is wrong."""
    trained = AutoModelForCausalLM.from_pretrained(extended)
    (tmp_path / "rope.json").write_text(json.dumps(live_rope(trained, Lengths(WINDOW, WINDOW, 8 * WINDOW))))
    assert cli.run(lambda: cli.app(["doctor", str(extended), "--no-probe"], standalone_mode=False)) == 0
    assert "It is the RoPE that its run trained" in capsys.readouterr().out
    config = json.loads((extended / "config.json").read_text())
    del config["rope_parameters"], config["rope_scaling"]
    (extended / "config.json").write_text(json.dumps(config))
    for arguments in ([], ["--fix", str(tmp_path / "mended")]):
        command = ["doctor", str(extended), "--no-probe", *arguments]
        assert cli.run(lambda command=command: cli.app(command, standalone_mode=False)) == 2
        said = capsys.readouterr()
        assert "another RoPE than the model was trained with. Bring it back, or train again" in " ".join(
            said.out.split()
        )
        assert "--fix cannot fix" in said.err or "can fix nothing here" in said.err
    assert not (tmp_path / "mended").exists()
    (tmp_path / "rope.json").unlink()
    assert cli.run(lambda: cli.app(["doctor", str(extended), "--no-probe"], standalone_mode=False)) == 0
    assert "What was trained they do not say" in capsys.readouterr().out


def test_a_copy_goes_to_a_new_directory(extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = doctor(extended, "--no-probe", "--fix", extended, capsys=capsys)
    assert code == 2


def test_the_embedded_model_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = doctor("builtin:tiny", "--no-probe", capsys=capsys)
    assert code == 0


def test_models_without_rope_are_refused() -> None:
    with pytest.raises(UserError, match="ALiBi"):
        diagnose({"model_type": "bloom"}, {})
