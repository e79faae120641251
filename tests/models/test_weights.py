"""A model is loaded whole or refused: files that cannot be opened, names that do not fit, quantized weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from skipwise import UserError
from skipwise.models.config import ModelConfig
from skipwise.models.load import check_weights, load_model
from skipwise.models.quantized import DEQUANTISED, quantization_of
from tests.commands import error_code, skipwise
from tests.picomodels import byte_tokenizer, pico_llama

CPU = torch.device("cpu")
# As a large-file store leaves it in a file's place.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n"
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
    "shards of a model that were not gathered": lambda weights: {
        name: torch.empty(0) if "mlp" in name else own for name, own in weights.items()},
    "wrapped layers": lambda weights: {
        name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): own for name, own in weights.items()},
    "adapters that were not merged": lambda weights: {
        name.replace("q_proj.", "q_proj.base_layer."): own for name, own in weights.items()},
    "an adapter beside": lambda weights: {
        **weights, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
    "a bias that the class has not": lambda weights: {**weights, "model.layers.0.mlp.up_proj.bias": torch.ones(128)},
}  # fmt: skip
# What a checkpoint may hold besides.
HARMLESS: dict[str, Callable[[Weights], Weights]] = {
    "as it is": lambda weights: weights,
    "tables of older versions": lambda weights: {
        **weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "angles of older versions": lambda weights: {
        **weights, "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4, 4)},
    "scales of a cache": lambda weights: {**weights, "model.layers.0.self_attn.k_scale": torch.ones(1)},
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


def test_what_to_do_is_said_by_how_the_names_differ(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    for name, remedy in (
        ("a prefix of a wrapper", "'module.'"),
        ("wrapped layers", "'_fsdp_wrapped_module'"),
        ("an adapter beside", "merge_and_unload"),
        ("half a layer", "Download it again"),
    ):
        save_file(stored, checkpoint / "model.safetensors", {"format": "pt"})
        change(checkpoint, BROKEN[name])
        with pytest.raises(UserError) as caught:
            check_weights(ModelConfig(path=str(checkpoint)))
        assert remedy in str(caught.value), name


@pytest.mark.parametrize("left_out", ["experts.3.", "experts.3.w1", "experts.3.w2", "experts"])
def test_experts_that_are_missing_are_found(left_out: str, tmp_path: Path) -> None:
    """Where one gate was missing, transformers said "look at the above report", which was silenced."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    check_weights(ModelConfig(path=str(tmp_path)))
    change(tmp_path, without(f"layers.1.block_sparse_moe.{left_out}"))
    for ask in (lambda: check_weights(ModelConfig(path=str(tmp_path))),
                lambda: load_model(ModelConfig(path=str(tmp_path)), CPU)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ask()
        assert caught.value.code == "weights_do_not_fit"


@pytest.mark.parametrize("predicted", [0, 1])
def test_layers_for_more_tokens_are_left_out_where_the_config_has_them(predicted: int, tmp_path: Path) -> None:
    """transformers knows the numbers of these layers in published models, and no others."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = Glm4MoeConfig(**sizes, **heads, num_hidden_layers=2, num_nextn_predict_layers=predicted)
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path, lambda weights: {**weights, "model.layers.2.eh_proj.weight": torch.ones(32, 64)})
    if predicted:
        check_weights(ModelConfig(path=str(tmp_path)))
        load_model(ModelConfig(path=str(tmp_path)), CPU)
        change(tmp_path, lambda weights: {**weights, "model.layers.3.eh_proj.weight": torch.ones(32, 64)})
    with pytest.raises(UserError) as caught:
        check_weights(ModelConfig(path=str(tmp_path)))
    assert caught.value.code == "weights_do_not_fit"


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    """transformers 5 loads both, and other programs take one for both: the trained model would be another there."""
    pico_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    for times, code in ((1.0, None), (2.0, "tied_weights_differ")):
        change(tmp_path, lambda own: {**own, "lm_head.weight": times * own["model.embed_tokens.weight"]})  # noqa: B023
        if code is None:
            load_model(ModelConfig(path=str(tmp_path)), CPU)
            continue
        with pytest.raises(UserError) as caught:
            load_model(ModelConfig(path=str(tmp_path)), CPU)
        assert caught.value.code == code


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(number: float, checkpoint: Path) -> None:
    """Training ended in its first step, after the evaluations, and proposed a lower learning rate."""
    name = "model.layers.1.mlp.up_proj.weight"
    change(checkpoint, lambda weights: {**weights, name: weights[name].index_fill(0, torch.tensor([3]), number)})
    with pytest.raises(UserError, match=name) as caught:
        load_model(ModelConfig(path=str(checkpoint)), CPU)
    assert caught.value.code == "weights_not_finite"


def test_doctor_fails_where_a_model_can_be_probed_and_not_loaded(tmp_path: Path) -> None:
    """It said so in a row of its table, and that nothing was wrong."""
    pico_llama(max_position_embeddings=512).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    skipwise("doctor", tmp_path)
    change(tmp_path, lambda own: {**own, "model.norm.weight": own["model.norm.weight"] * float("nan")})
    assert error_code(skipwise("doctor", tmp_path, code=2)) == "weights_not_finite"


@pytest.mark.parametrize(
    "changed",
    [{"hidden_size": "64"}, {"vocab_size": None}, {"quantization_config": "fp8"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_config_with_a_value_of_another_type_is_refused(changed: dict[str, Any], checkpoint: Path) -> None:
    """It ended in "Skipwise did not expect this"."""
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    for arguments in (["doctor"], ["plan", "--target", "512"]):
        skipwise(arguments[0], checkpoint, *arguments[1:], code=2)


def test_an_adapter_is_no_model(checkpoint: Path) -> None:
    """transformers loads its base in place of the weights beside it, without a word."""
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    for arguments in (["doctor"], ["plan", "--target", "512"]):
        assert error_code(skipwise(arguments[0], checkpoint, *arguments[1:], code=2)) == "model_is_adapter"
    (checkpoint / "config.json").unlink()
    assert error_code(skipwise("doctor", checkpoint, code=2)) == "model_is_adapter"


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
@pytest.mark.parametrize(
    "what",
    ["pickles", "pointers", "tokenizer", "pickled pointers", "shard", "index", "cut", "consolidated", "no index"],
)
def test_files_that_cannot_be_opened_are_said_with_a_remedy(what: str, command: list[str], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    if what == "pickles":
        weights.rename(checkpoint / "pytorch_model.bin")
        wanted = ("weights_are_pickles", "use_safetensors=False")
    elif what == "pointers":
        weights.write_text(POINTER)
        wanted = ("weights_are_pointers", "git lfs pull")
    elif what == "tokenizer":
        (checkpoint / "tokenizer.json").write_text(POINTER)
        wanted = ("weights_are_pointers", "git lfs pull")
    elif what == "pickled pointers":
        weights.unlink()
        (checkpoint / "pytorch_model.bin").write_text(POINTER)
        wanted = ("weights_are_pointers", "git lfs pull")
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
        wanted = ("weights_file_broken", "Download it again")
    elif what == "consolidated":
        weights.rename(checkpoint / "consolidated.safetensors")
        wanted = ("weights_in_other_layout", "consolidated.safetensors")
    elif what == "no index":
        in_two_files(checkpoint)
        (checkpoint / "model.safetensors.index.json").unlink()
        wanted = ("weights_in_other_layout", "model.safetensors.index.json")
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


@pytest.mark.parametrize(
    "beside",
    [
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "tokenizer.model",
    ],
)
def test_files_that_are_not_opened_may_be_anything(beside: str, checkpoint: Path) -> None:
    """Mistral publishes its weights twice; who needs one of them gets one. Nor is a tokenizer.model beside .json."""
    (checkpoint / beside).write_text(POINTER)
    check_weights(ModelConfig(path=str(checkpoint)))
    load_model(ModelConfig(path=str(checkpoint)), CPU)


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


def in_rows_of_mxfp8(weights: Weights, block: int = 32) -> Weights:
    """Float8, and for every 32 numbers a power of two, of which the exponent is stored."""
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            blocks = weight.view(len(weight), -1, block)
            exponent = (blocks.abs().amax(-1) / 448).log2().ceil()
            stored[name] = (blocks / exponent.exp2()[..., None]).view_as(weight).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = (exponent + 127).to(torch.uint8)
    return stored


def in_one_fp8(weights: Weights) -> Weights:
    """Float8 with one scale for a whole matrix, and scales of activations, which training has no use for."""
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored |= {f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(0.1)}
    return stored


FP8: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any]]] = {
    "blocks": (in_blocks_of_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic",
                                  "weight_block_size": [128, 128]}),
    "static": (in_one_fp8, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "mxfp8": (in_rows_of_mxfp8, {"quant_method": "mxfp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
                                 "weight_block_size": [1, 32]}),
}  # fmt: skip


@pytest.fixture(params=FP8)
def stored_in_8_bits(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    store, settings = FP8[request.param]
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    pico_llama(**wide).save_pretrained(tmp_path)
    change(tmp_path, store)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return tmp_path


def test_every_form_of_fp8_gives_the_weights_back(stored_in_8_bits: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    check_weights(ModelConfig(path=str(stored_in_8_bits)))
    model, original = load_model(ModelConfig(path=str(stored_in_8_bits)), CPU), pico_llama(**wide)
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1 / 16, atol=2e-3)  # three bits of fraction
    assert "dequantised" in " ".join(skipwise("plan", stored_in_8_bits, "--target", "512").split())


def test_fp8_without_its_scales_is_refused(stored_in_8_bits: Path) -> None:
    """It was loaded as float8, each weight some hundred times too large."""
    change(stored_in_8_bits, lambda own: {k: v for k, v in own.items() if "layers.1" not in k or "scale" not in k})
    for ask in (lambda: check_weights(ModelConfig(path=str(stored_in_8_bits))),
                lambda: load_model(ModelConfig(path=str(stored_in_8_bits)), CPU)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ask()
        assert caught.value.code == "weights_do_not_fit"


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantized_weights_of_which_the_config_says_nothing_are_refused(kind: torch.dtype, checkpoint: Path) -> None:
    """They were taken for numbers. Our own exports of block-FP8 were such files."""
    change(checkpoint, lambda own: {name: one.to(kind) if "_proj" in name else one for name, one in own.items()})
    for ask in (lambda: check_weights(ModelConfig(path=str(checkpoint))),
                lambda: load_model(ModelConfig(path=str(checkpoint)), CPU)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ask()
        assert caught.value.code == "weights_quantized"


def test_quantized_weights_are_not_packed_once_more(stored_in_8_bits: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(stored_in_8_bits)), CPU, four_bits=True)
    assert caught.value.code == "weights_quantized"


def test_what_is_dequantised_exists() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in DEQUANTISED.values())


def test_a_directory_without_weights_is_planned_and_not_loaded(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    skipwise("plan", checkpoint, "--target", "512")
    assert "not looked at" in json.loads(skipwise("doctor", checkpoint, "--json"))["weights"]
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(checkpoint)), CPU)
    assert caught.value.code == "weights_not_found"
    shutil.rmtree(checkpoint)
