"""A model is loaded whole or refused: files that cannot be opened, names that do not fit, quantized weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from skipwise import UserError
from skipwise.config import ModelConfig
from skipwise.models.load import check_weights, load_model
from skipwise.models.quantized import DEQUANTISED, quantization_of
from tests.commands import error_code, skipwise
from tests.conftest import byte_tokenizer, pico_llama

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: own for name, own in weights.items() if not any(part in name for part in parts)}


# What was done to the names and shapes of a checkpoint.
BROKEN: dict[str, Callable[[Weights], Weights]] = {
    "no output layer": without("lm_head"),
    "half a layer": without("layers.1.mlp"),
    "a prefix of a wrapper": lambda weights: {f"module.{name}": own for name, own in weights.items()},
    "a prefix of the compiler": lambda weights: {f"_orig_mod.{name}": own for name, own in weights.items()},
    "another shape": lambda weights: {**weights, "model.norm.weight": torch.ones(3)},
    "another vocabulary": lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"][:100]},
    "more layers than the config says": lambda weights: {**weights, "model.layers.2.mlp.up_proj.weight": torch.ones(3)},
    "a bias that the class has not": lambda weights: {**weights, "model.layers.0.mlp.up_proj.bias": torch.ones(128)},
}
# What a checkpoint may hold besides.
HARMLESS: dict[str, Callable[[Weights], Weights]] = {
    "as it is": lambda weights: weights,
    "tables of older versions": lambda weights: {
        **weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "a head of another task": lambda weights: {**weights, "v_head.summary.weight": torch.ones(3)},
    "a tower for images": lambda weights: {**weights, "model.vision_tower.layers.0.weight": torch.ones(3)},
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Llama whose output layer is not tied."""
    directory = tmp_path / "base"
    pico_llama(tie_word_embeddings=False).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def change(directory: Path, how: Callable[[Weights], Weights]) -> None:
    weights = how(load_file(directory / "model.safetensors"))
    save_file(
        {name: own.contiguous() for name, own in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def in_two_files(directory: Path) -> None:
    """The same weights in two files with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}  # type: dict[str, Weights]
    for number, (name, own) in enumerate(weights.items()):
        halves[list(halves)[number % 2]][name] = own
    for file, own in halves.items():
        save_file(own, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "two files"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_is_not_whole_is_refused(name: str, sharded: bool, checkpoint: Path) -> None:
    """Loaded with random tensors, trained and written, it was called checked."""
    change(checkpoint, BROKEN[name])
    if sharded:
        in_two_files(checkpoint)
    for ask in (lambda: check_weights(ModelConfig(path=str(checkpoint))),
                lambda: load_model(ModelConfig(path=str(checkpoint)), CPU)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ask()
        assert caught.value.code == "weights_do_not_fit"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_checkpoint_may_hold_besides(name: str, checkpoint: Path) -> None:
    change(checkpoint, HARMLESS[name])
    check_weights(ModelConfig(path=str(checkpoint)))
    load_model(ModelConfig(path=str(checkpoint)), CPU)


def test_tied_weights_need_not_be_stored(tmp_path: Path) -> None:
    pico_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    check_weights(ModelConfig(path=str(tmp_path)))
    change(tmp_path, without("embed_tokens"))
    with pytest.raises(UserError, match=r"embed_tokens"):
        check_weights(ModelConfig(path=str(tmp_path)))


def test_names_without_the_prefix_of_the_base_are_found(tmp_path: Path) -> None:
    """GPT-2 is published so; transformers adds the prefix."""
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(tmp_path)
    change(tmp_path, lambda weights: {name.removeprefix("transformer."): own for name, own in weights.items()})
    check_weights(ModelConfig(path=str(tmp_path)))


def test_every_command_refuses_before_it_begins(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint, BROKEN["no output layer"])
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("words " * 3000)
    for arguments in (
        ["extend", checkpoint, "--target", "512", "--data", text, "--output", run],
        ["extend", checkpoint, "--target", "512", "--data", text, "--output", run, "--dry-run"],
        ["evaluate", checkpoint, "--data", text, "--output", run],
        ["plan", checkpoint, "--target", "512"],
        ["doctor", checkpoint],
        ["search", checkpoint, "--target", "512", "--data", text, "--output", run],
    ):
        assert error_code(skipwise(*arguments, code=2)) == "weights_do_not_fit", arguments
    assert not (run / "resolved.yaml").exists()


@pytest.mark.parametrize("command", [["doctor"], ["plan", "--target", "512"]], ids=["doctor", "plan"])
@pytest.mark.parametrize("what", ["pickles", "pointers", "shard", "index"])
def test_files_that_cannot_be_opened_are_said_with_a_remedy(what: str, command: list[str], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    if what == "pickles":
        weights.rename(checkpoint / "pytorch_model.bin")
        wanted = ("weights_are_pickles", "use_safetensors=False")
    elif what == "pointers":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n")
        wanted = ("weights_are_pointers", "git lfs pull")
    elif what == "shard":
        in_two_files(checkpoint)
        (checkpoint / "model-00002-of-00002.safetensors").unlink()
        wanted = ("weights_shard_missing", "model-00002-of-00002.safetensors")
    else:
        in_two_files(checkpoint)
        (checkpoint / "model.safetensors.index.json").write_text("{")
        wanted = ("weights_index_broken", "model.safetensors.index.json")
    said = skipwise(command[0], checkpoint, *command[1:], code=2)
    assert error_code(said) == wanted[0] and wanted[1] in said.replace("\n", "")
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(checkpoint)), CPU)
    assert caught.value.code == wanted[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4}, "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True}, "compressed-tensors": {"quant_method": "compressed-tensors"},
    "torchao": {"quant_method": "torchao"}, "fp_quant": {"quant_method": "fp_quant"},
}  # fmt: skip


@pytest.mark.parametrize("method", SETTINGS)
def test_quantized_weights_are_refused_by_the_config_alone(method: str, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": SETTINGS[method]}))
    (checkpoint / "model.safetensors").unlink()
    for arguments in (["plan", "--target", "512"], ["doctor"],
                      ["extend", "--target", "512", "--data", "builtin:python", "--dry-run"]):  # fmt: skip
        said = skipwise(arguments[0], checkpoint, *arguments[1:], code=2)
        assert error_code(said) == "weights_quantized" and method in said


def test_settings_of_wrappers_and_other_places() -> None:
    assert quantization_of({"text_config": {"quantization_config": {"quant_method": "fp8"}}}) == "fp8"
    assert quantization_of({"compression_config": {"quant_method": "compressed-tensors"}}) == "compressed-tensors"
    assert quantization_of({"quantization_config": {"bits": 4}}) == "unknown"
    assert quantization_of({}) is None and quantization_of({"quantization_config": None}) is None


def in_blocks_of_fp8(weights: Weights, block: int = 128) -> Weights:
    """As DeepSeek stores its matrices: float8, and a scale for every block."""
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    return stored


@torch.no_grad()
def test_block_fp8_is_dequantised_and_written_as_ordinary_weights(tmp_path: Path) -> None:
    """It was written as float8 without its scales, which nothing can read."""
    from skipwise import Lengths, YaRN, set_rope_scaling
    from skipwise.export.checkpoint import save_checkpoint

    base = tmp_path / "base"
    original = pico_llama(hidden_size=128, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)
    original.save_pretrained(base)
    change(base, in_blocks_of_fp8)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": [128, 128]}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    check_weights(ModelConfig(path=str(base)))
    model = load_model(ModelConfig(path=str(base)), CPU)
    rounding = max(
        float((one - other).abs().max()) for one, other in zip(model.parameters(), original.parameters(), strict=True)
    )
    assert 0 < rounding < 0.05 and {own.dtype for own in model.parameters()} == {torch.float32}
    lengths = Lengths(64, 64, 512)
    set_rope_scaling(model, YaRN(), lengths)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "written", lengths, card="")
    assert "quantization_config" not in json.loads((tmp_path / "written/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written").eval()
    ids = torch.arange(3, 103)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_what_is_dequantised_exists() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in DEQUANTISED.values())


def test_a_directory_without_weights_is_planned_and_not_loaded(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    skipwise("plan", checkpoint, "--target", "512")
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(checkpoint)), CPU)
    assert caught.value.code == "weights_not_found"
    shutil.rmtree(checkpoint)
