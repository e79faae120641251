"""`skipwise.save` and `load_adapter`: every program reads the RoPE that was trained, also of an adapter."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import skipwise as library
from skipwise import NTK, Lengths, Linear, UserError, YaRN, YaRNRevised, load_adapter, save, set_rope_scaling
from skipwise.export.doctor import diagnose, read_siblings
from skipwise.export.readers import READERS, difference, transformers_5
from skipwise.models.rope import live_rope
from skipwise.training.adapters import WARNING_KEY
from tests.commands import error_code, skipwise
from tests.picomodels import WINDOW, pico_llama, pico_neox, pico_qwen3
from tests.picotypes import small_model

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
    assert all(finding.limit for finding in diagnose(config, read_siblings(tmp_path / "out")).findings)  # of llama.cpp
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


def test_the_present_directory_is_a_place(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is empty, and a place beside it has to have another."""
    monkeypatch.chdir(tmp_path)
    save(llama, tokenizer, ".")
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("first", ["20KB", "50GB"])
def test_weights_of_before_are_not_read(
    first: str, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    """One file wins over several, so a model of several was read as the one that was there before."""
    pico_qwen3().save_pretrained(tmp_path / "out", max_shard_size=first)
    one_file = first == "50GB"
    if one_file:  # the new one has several
        plain = llama.save_pretrained
        monkeypatch.setattr(llama, "save_pretrained", lambda path: plain(path, max_shard_size="20KB"))
    set_rope_scaling(llama, YaRN(), LENGTHS)
    save(llama, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(llama))
    assert (tmp_path / "out/model.safetensors").exists() != one_file
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == one_file


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_saved_as_it_is(
    wrap: Any, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    set_rope_scaling(llama, YaRN(), LENGTHS)
    save(wrap(llama), tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(llama))


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_shards_are_not_taken_for_a_model(
    engine: str, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A process of ZeRO-3 has empty weights outside of a step, which were written."""
    with one_process():
        if engine == "FSDP2":
            fully_shard(llama, mesh=init_device_mesh("cpu", (1,)))
        for weight in llama.parameters() if engine == "ZeRO-3" else ():
            weight.ds_numel, weight.data = weight.numel(), torch.empty(0)  # type: ignore[attr-defined]
        with pytest.raises(UserError) as caught:
            save(llama, tokenizer, tmp_path / "out")
    assert caught.value.code == "model_is_sharded" and not list(tmp_path.iterdir())


def test_the_first_of_several_processes_writes(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    save(llama, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_special_tokens_are_where_every_version_looks(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers 4 takes `extra_special_tokens` for a dictionary, and fails on the list of transformers 5."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    llama.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(llama, tokenizer, tmp_path / "out")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<|one|>", "<|two|>"] and "extra_special_tokens" not in settings
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    assert again("a<|two|>b")["input_ids"] == tokenizer("a<|two|>b")["input_ids"]


@pytest.mark.parametrize("begins", [True, False])
def test_a_token_before_every_text_is_where_every_version_looks(begins: bool, tmp_path: Path) -> None:
    """The class of Llama in transformers 4 puts one there unless the settings say no; transformers 5 writes none."""
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "▁", "a", "▁a"))}
    own = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")], add_bos_token=begins)
    save(pico_llama(), own, tmp_path / "out")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (begins, False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [1] * begins + [5]


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


@pytest.mark.parametrize("scaling", [Linear(), YaRN(), YaRNRevised(), NTK()], ids=lambda scaling: scaling.name)
def test_an_adapter_takes_the_extended_base_from_disk(
    scaling: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Where the RoPE is in both forms, and read with one key more."""
    model = pico_llama()
    set_rope_scaling(model, scaling, LENGTHS)
    save(model, tokenizer, tmp_path / "base")
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    save(adapted, tokenizer, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(tmp_path / "base", tmp_path / "adapter")), logits(adapted))


def extended_before(path: Path) -> Path:
    """A base as Llama 3.1 is: published with a longer window than it was pretrained with."""
    model = pico_llama()
    bands = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model.config.rope_parameters |= {"rope_type": "llama3", "original_max_position_embeddings": WINDOW, **bands}
    model.config.max_position_embeddings = 2 * WINDOW
    model.save_pretrained(path)
    return path


def test_an_adapter_of_a_base_that_was_extended_before_goes_on_that_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = extended_before(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    set_rope_scaling(model, YaRN(), LENGTHS)
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    save(adapted, tokenizer, tmp_path / "adapter")
    again = load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted))
    save(again, tokenizer, tmp_path / "twice")
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "twice")), logits(adapted))
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), tmp_path / "adapter")
    assert caught.value.code == "adapter_base_other_rope"


def base_with(**changes: Any) -> PreTrainedModel:
    model = pico_llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_an_adapter_on_another_base_is_refused(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, _ = adapter
    other = pico_llama()
    set_rope_scaling(other, Linear(), LENGTHS)
    refused = [
        ("adapter_base_other_rope", other, directory),
        ("adapter_base_other_rope", base_with(max_position_embeddings=2 * WINDOW), directory),
        ("adapter_base_other_rope", base_with(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), directory),
        ("adapter_base_mismatch", pico_qwen3(), directory),
        ("not_an_adapter", pico_llama(), tmp_path),
    ]
    for code, *arguments in refused:
        with pytest.raises(UserError) as caught:
            load_adapter(*arguments)
        assert caught.value.code == code
    (directory / "skipwise_rope.json").unlink()
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), directory)
    assert caught.value.code == "adapter_without_rope"


@pytest.mark.parametrize("what", ["half", "prefix", "layer too many", "shape", "nan", "cut", "pointer", "absent"])
def test_an_adapter_is_loaded_whole_or_refused(what: str, adapter: tuple[Path, torch.Tensor]) -> None:
    """peft leaves zeros where weights are missing: the base as it was, with the RoPE of another."""
    file = adapter[0] / "adapter_model.safetensors"
    weights = {name: own.clone() for name, own in load_file(file).items()}  # the file changes below
    more = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    changed = {
        "half": {name: own for name, own in weights.items() if "layers.1." not in name},
        "prefix": {f"module.{name}": own for name, own in weights.items()},
        "layer too many": {**weights, **more},
        "shape": {name: own[:1].contiguous() if "lora_A" in name else own for name, own in weights.items()},
    }
    code = "weights_do_not_fit"
    if what == "nan":
        save_file({name: own * float("nan") for name, own in weights.items()}, file, {"format": "pt"})
        code = "weights_not_finite"
    elif what in changed:
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
    base = pico_llama()
    before = logits(base)
    with pytest.raises(UserError) as caught:
        load_adapter(base, adapter[0])
    assert caught.value.code == code
    assert torch.equal(logits(base), before)
    save_file(weights, file, {"format": "pt"})
    torch.testing.assert_close(logits(load_adapter(base, adapter[0])), adapter[1])  # the base is as it was


def test_a_directory_holds_an_adapter_or_a_whole_model(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A merged model beside its adapter was opened with the adapter in it twice."""
    directory, _ = adapter
    loaded: Any = load_adapter(pico_llama(), directory)
    pico_llama().save_pretrained(tmp_path / "whole")
    before = {path: sorted(file.name for file in path.iterdir()) for path in (directory, tmp_path / "whole")}
    for model, path in ((loaded, tmp_path / "whole"), (loaded.merge_and_unload(), directory)):
        with pytest.raises(UserError) as caught:
            save(model, tokenizer, path)
        assert caught.value.code == "directory_holds_another_kind"
        assert sorted(file.name for file in path.iterdir()) == before[path]


def test_an_adapter_is_not_exported(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    assert error_code(skipwise("export", adapter[0], tmp_path / "out", code=2)) == "adapter_not_merged"
    assert not (tmp_path / "out").exists()


def test_what_a_training_left_is_not_exported(
    tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Optimizers, pickles and checkpoints beside a model of a `Trainer` went along, and to the hub with --push."""
    set_rope_scaling(llama, YaRN(), LENGTHS)
    llama.generation_config.max_length = WINDOW
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {file.name for file in (tmp_path / "model").iterdir()} | {"README.md", "LICENSE"}
    left = ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", "LICENSE")
    for name in (*left, "checkpoint-10/model.safetensors", "runs/today/events.out.1"):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    skipwise("export", tmp_path / "model", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == given
    assert "max_length" not in json.loads((tmp_path / "out/generation_config.json").read_text())


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize("how", ["add_adapter of transformers", "several with names"])
def test_adapters_of_every_kind_bring_their_rope(how: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """One that transformers put into the model was written without its RoPE; of those with names none was found."""
    model: Any = pico_llama()
    set_rope_scaling(model, YaRN(), LENGTHS)
    if how == "several with names":
        model = get_peft_model(model, lora(), adapter_name="one")
        model.add_adapter("two", lora())
    else:
        model.add_adapter(lora())
    save(model, tokenizer, tmp_path / "out")
    for name in ("one", "two") if how == "several with names" else ("",):
        if name:
            model.set_adapter(name)
        again = load_adapter(pico_llama(), tmp_path / "out" / name)
        torch.testing.assert_close(logits(again), logits(model))
        assert live_rope(again, LENGTHS) == live_rope(model, LENGTHS)


def test_an_adapter_of_a_second_training_belongs_to_the_model_of_the_first(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The RoPE of the first base stayed in memory, so that the adapter went on that one and refused its own."""
    model = pico_llama()
    set_rope_scaling(model, YaRN(), replace(LENGTHS, target=LENGTHS.original * 2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)  # trained
    save(model, tokenizer, tmp_path / "first")
    set_rope_scaling(model, YaRN(), LENGTHS)
    adapted: Any = get_peft_model(model, lora())
    save(adapted, tokenizer, tmp_path / "second")
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), tmp_path / "second")
    assert caught.value.code == "adapter_base_other_rope"
    torch.testing.assert_close(logits(load_adapter(tmp_path / "first", tmp_path / "second")), logits(adapted))


@pytest.mark.parametrize("what", ["nothing", "no key", "unknown method"])
def test_a_damaged_adapter_is_one_message(what: str, adapter: tuple[Path, torch.Tensor]) -> None:
    name = "adapter_config.json" if what == "unknown method" else "skipwise_rope.json"
    content = json.loads((adapter[0] / name).read_text())
    content |= {"peft_type": "NOPE"} if what == "unknown method" else {}
    if what == "no key":
        del content["before"]
    (adapter[0] / name).write_text(json.dumps(content))
    if what == "nothing":
        load_adapter(pico_llama(), adapter[0])
        return
    with pytest.raises(UserError) as caught:
        load_adapter(pico_llama(), adapter[0])
    code = "adapter_not_readable" if what == "unknown method" else "adapter_rope_not_readable"
    assert caught.value.code == code


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError) as caught:
        save(model, tokenizer, tmp_path / "out")
    assert caught.value.code == "weights_not_finite" and not (tmp_path / "out").exists()


def test_an_adapted_model_may_get_its_rope_later(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The RoPE of before was kept on the outer model, so that the adapter refused its own base."""
    model: Any = get_peft_model(pico_llama(), lora())
    set_rope_scaling(model, YaRN(), LENGTHS)
    save(model, tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(load_adapter(pico_llama(), tmp_path / "out")), logits(model))


def test_the_model_inside_of_an_adapted_one_is_not_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL puts the adapter around the model that it was given; written as it is, no weight has the name of before."""
    model: Any = pico_llama()
    adapted: Any = get_peft_model(model, lora())
    with pytest.raises(UserError) as caught:
        save(model, tokenizer, tmp_path / "out")
    assert caught.value.code == "adapter_inside_model" and not list(tmp_path.iterdir())
    merged = adapted.merge_and_unload()
    save(merged, tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(merged))


def test_only_peft_alone_warns_that_it_loses_the_rope(adapter: tuple[Path, torch.Tensor]) -> None:
    with pytest.warns(UserWarning, match=WARNING_KEY):
        PeftModel.from_pretrained(pico_llama(), str(adapter[0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(pico_llama(), adapter[0])
    assert not [warning for warning in caught if WARNING_KEY in str(warning.message)]


def test_an_adapter_does_not_go_on_another(adapter: tuple[Path, torch.Tensor]) -> None:
    inside: Any = pico_llama()
    for base in (get_peft_model(inside, lora()), inside):
        with pytest.raises(UserError) as caught:
            load_adapter(base, adapter[0])
        assert caught.value.code == "adapter_on_adapter"


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
        diagnose(json.loads((tmp_path / "out/config.json").read_text()), read_siblings(tmp_path / "out")).findings == []
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "not recorded" in card and f"{LENGTHS.target:,}" in card


@pytest.mark.parametrize(("kind", "reader"), [("persimmon", "vLLM"), ("jais2", "transformers 4")])
def test_a_reader_without_such_a_model_is_left_out_and_named(
    kind: str, reader: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """It is no refusal, and not among those that were checked."""
    model = small_model(kind)
    set_rope_scaling(model, NTK(), LENGTHS)
    save(model, tokenizer, tmp_path / "model")
    said = skipwise("export", tmp_path / "model", tmp_path / "out")
    checked = said[said.index("Checked") :].split(f"{reader}: ")[0]
    assert reader not in checked
    for text in (said, (tmp_path / "out/README.md").read_text()):
        assert f"{reader}: it has no such model." in text


def test_what_is_neither_run_nor_model_is_refused(tmp_path: Path) -> None:
    assert error_code(skipwise("export", tmp_path, tmp_path / "out", code=2)) == "not_a_run"
    (tmp_path / "config.json").write_text(json.dumps(pico_llama().config.to_dict()))
    assert error_code(skipwise("export", tmp_path, tmp_path / "out", code=2)) == "weights_not_found"
    assert not (tmp_path / "out").exists()


def test_both_are_public() -> None:
    assert {"save", "load_adapter"} <= set(library.__all__)
