"""`skipwise.save` and `load_adapter`: every program reads the RoPE that was trained, also of an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import skipwise as library
from skipwise import Lengths, Linear, UserError, YaRN, load_adapter, save, set_rope_scaling
from skipwise.models.doctor import diagnose, read_beside
from skipwise.models.readers import READERS, difference, transformers_5
from skipwise.models.rope import live_rope
from tests.commands import error_code, skipwise
from tests.conftest import WINDOW, pico_llama, pico_neox, pico_qwen3

LENGTHS = Lengths(WINDOW, WINDOW, 8 * WINDOW)
IDS = torch.arange(3, 203)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return result


@pytest.mark.parametrize("scaling", [YaRN(), Linear()], ids=lambda scaling: scaling.name)
@pytest.mark.parametrize("build", [pico_llama, pico_qwen3, pico_neox])
def test_every_reader_reads_what_was_saved(
    build: Any, scaling: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers 4 read theta 10,000 and no scaling; the tokenizer's limit was the original window."""
    model, limit = build(), tokenizer.model_max_length
    set_rope_scaling(model, scaling, LENGTHS)
    save(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model))
    assert live_rope(again, LENGTHS) == live_rope(model, LENGTHS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for name in ("transformers 4", "vLLM"):
        assert difference(READERS[name](config), transformers_5(config)) is None
    assert all(finding.limit for finding in diagnose(config, read_beside(tmp_path / "out")).findings)  # of llama.cpp
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == LENGTHS.target
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.model_max_length == limit


def test_other_files_of_the_directory_stay(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A Trainer keeps its checkpoints there."""
    checkpoint = tmp_path / "out" / "checkpoint-10" / "trainer_state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    set_rope_scaling(llama, YaRN(), LENGTHS)
    for _ in range(2):
        save(llama, tokenizer, str(tmp_path / "out"))
    assert checkpoint.read_text() == "{}" and (tmp_path / "out/model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_family_that_loses_its_rope_is_not_written(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    set_rope_scaling(llama, YaRN(), LENGTHS)
    llama.model.rotary_emb.inv_freq = llama.model.rotary_emb.inv_freq * 2
    with pytest.raises(UserError) as caught:
        save(llama, tokenizer, tmp_path / "out")
    assert caught.value.code == "config_loses_rope" and not list(tmp_path.iterdir())


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, torch.Tensor]:
    """An adapter of an extended model that was changed, and the logits of that model."""
    model = pico_llama()
    set_rope_scaling(model, YaRN(), LENGTHS)
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save(adapted, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter", logits(adapted)


def test_an_adapter_brings_its_rope(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Put on the original base by peft alone it had a window of the original length, without a word."""
    directory, wanted = adapter
    assert not (directory / "config.json").exists()
    lost: Any = PeftModel.from_pretrained(pico_llama(), str(directory))
    assert not torch.allclose(logits(lost), wanted, atol=0.1)
    pico_llama().save_pretrained(tmp_path / "base")
    for base in (pico_llama(), tmp_path / "base", str(tmp_path / "base")):
        loaded = load_adapter(base, directory)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)
        assert loaded.config.max_position_embeddings == LENGTHS.target
    extended = pico_llama()
    set_rope_scaling(extended, YaRN(), LENGTHS)
    torch.testing.assert_close(logits(load_adapter(extended, directory)), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_another_base_is_refused(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, _ = adapter
    other = pico_llama()
    set_rope_scaling(other, Linear(), LENGTHS)
    refused = {
        "adapter_base_extended": (other, directory),
        "adapter_base_mismatch": (pico_qwen3(), directory),
        "not_an_adapter": (pico_llama(), tmp_path),
    }
    for code, arguments in refused.items():
        with pytest.raises(UserError) as caught:
            load_adapter(*arguments)
        assert caught.value.code == code
    (directory / "skipwise_rope.json").unlink()
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), directory)
    assert caught.value.code == "adapter_without_rope"


@pytest.mark.parametrize("what", ["half", "prefix", "layer too many", "shape", "cut", "pointer", "absent"])
def test_an_adapter_is_loaded_whole_or_refused(what: str, adapter: tuple[Path, torch.Tensor]) -> None:
    """peft leaves zeros where weights are missing: the base as it was, with the RoPE of another."""
    file = adapter[0] / "adapter_model.safetensors"
    weights = load_file(file)
    more = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    changed = {
        "half": {name: own for name, own in weights.items() if "layers.1." not in name},
        "prefix": {f"module.{name}": own for name, own in weights.items()},
        "layer too many": {**weights, **more},
        "shape": {name: own[:1].contiguous() if "lora_A" in name else own for name, own in weights.items()},
    }
    code = "weights_do_not_fit"
    if what in changed:
        save_file(changed[what], file, {"format": "pt"})
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
        code = "adapter_not_readable"
    elif what == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n")
        code = "weights_are_pointers"
    else:
        file.unlink()
        code = "weights_not_found"
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), adapter[0])
    assert caught.value.code == code


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_export_takes_any_model_that_carries_its_rope(
    how: str, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    set_rope_scaling(llama, YaRN(), LENGTHS)
    if how == "save":
        save(llama, tokenizer, tmp_path / "model")
    else:  # as somebody's own Trainer leaves it
        llama.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    said = skipwise("export", tmp_path / "model", tmp_path / "out", "--dtype", "bfloat16")
    assert "Checked: transformers 5" in said and "By rule, not opened" in said
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(llama), rtol=0.1, atol=0.1)
    assert (
        diagnose(json.loads((tmp_path / "out/config.json").read_text()), read_beside(tmp_path / "out")).findings == []
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "not recorded" in card and f"{LENGTHS.target:,}" in card


def test_what_is_neither_run_nor_model_is_refused(tmp_path: Path) -> None:
    assert error_code(skipwise("export", tmp_path, tmp_path / "out", code=2)) == "not_a_run"
    (tmp_path / "config.json").write_text(json.dumps(pico_llama().config.to_dict()))
    assert error_code(skipwise("export", tmp_path, tmp_path / "out", code=2)) == "weights_not_found"
    assert not (tmp_path / "out").exists()


def test_both_are_public() -> None:
    assert {"save", "load_adapter"} <= set(library.__all__)
