"""Low-rank adapters, and the plain model that comes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from skipwise import PoSE, WindowCollator, YaRN, load_adapter, set_rope_scaling
from skipwise.config.files import parse_config
from skipwise.errors import UserError
from skipwise.models.config import ModelConfig
from skipwise.models.load import load_model
from skipwise.models.locate import model_location
from skipwise.runs.directory import RunDir
from skipwise.training.adapters import add_adapters, check_adapters, merged, trained_weights
from skipwise.training.config import LoRAConfig, TrainConfig
from skipwise.training.trainer import train, training_arguments, window_loss
from skipwise.workflows.extend import extend
from tests.picomodels import pico_llama
from tests.training.examples import CPU, LENGTHS, examples

pytest.importorskip("peft")


def train_adapters(
    model: PreTrainedModel, lora: LoRAConfig, directory: Path, steps: int = 4, drawn: list[int] | None = None
) -> Any:
    adapted = add_adapters(model, lora)
    config = TrainConfig(max_steps=steps, learning_rate=1e-2, save_steps=2)
    collator = WindowCollator(PoSE(), LENGTHS, mark_text=True)

    def collate(features: list[Any]) -> dict[str, torch.Tensor]:
        if drawn is not None:
            drawn.append(len(features))
        return collator(features)

    train(
        model=adapted,  # type: ignore[arg-type]
        arguments=training_arguments(config, directory, seed=0, dtype=torch.float32, device=CPU),
        dataset=examples(4 * steps),
        collator=collate,
        eval_dataset=None,
        callbacks=[],
        teacher=None,
    )
    return adapted.eval()


def test_a_checkpoint_of_adapters_carries_the_rope(tmp_path: Path) -> None:
    model, ids = pico_llama(), torch.arange(3, 103)[None]
    set_rope_scaling(model, YaRN(), LENGTHS)
    adapted = train_adapters(model, LoRAConfig(r=2), tmp_path, steps=2)
    with torch.no_grad():
        trained = adapted(input_ids=ids).logits
        again = load_adapter(pico_llama(), tmp_path / "checkpoint-2")(input_ids=ids).logits
    torch.testing.assert_close(again, trained)


def extend_tiny(directory: Path, learning_rate: float, seed: int = 0, **lora: Any) -> RunDir:
    config = parse_config(
        {
            "model": {"path": "builtin:tiny"},
            "lengths": {"target": 512},
            "data": "builtin:python",
            "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": learning_rate, "lora": lora},
            "evaluate": [],
            "seed": seed,
        }
    )
    run = RunDir(directory / "run")
    extend(config, run.path, given="", console=Console(stderr=True))
    return run


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_the_merged_model_is_a_plain_one_that_says_the_same(tmp_path: Path, tied: bool, more: bool) -> None:
    model = pico_llama(tie_word_embeddings=tied).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = train_adapters(model, LoRAConfig(train_norms_and_embeddings=more), tmp_path)
    ids = torch.randint(100, (1, 20))
    expected = adapted(ids).logits
    plain = merged(adapted)
    assert isinstance(plain, type(model))
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    still = {name.split(".")[-2] for name in before if torch.equal(before[name], after[name])}
    untied = set() if tied else {"lm_head"}
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}
    all_but_linear = {"embed_tokens", *norms, "lm_head"}
    assert still == (untied if more else all_but_linear)


def test_checkpoints_hold_adapters_only_and_resume_exactly(tmp_path: Path) -> None:
    whole = trained_weights(train_adapters(pico_llama(), LoRAConfig(), tmp_path / "whole"))
    train_adapters(pico_llama(), LoRAConfig(), tmp_path / "parts")
    # Back to the middle: what came after is gone.
    for file in (tmp_path / "parts" / "checkpoint-4").iterdir():
        file.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    assert not (tmp_path / "parts" / "checkpoint-2" / "model.safetensors").exists()
    drawn: list[int] = []
    resumed = trained_weights(train_adapters(pico_llama(), LoRAConfig(), tmp_path / "parts", drawn=drawn))
    assert len(drawn) == 2  # the other half
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_extension_with_adapters_writes_a_stock_model(tmp_path: Path) -> None:
    run = extend_tiny(tmp_path, 1e-3, r=4)
    files = {path.name for path in run.model.iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if "adapter" in name]
    before = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_four_bit_weights_train_adapters_on_the_weights_they_came_from(tmp_path: Path) -> None:
    """What is written are the original weights with the adapters, not the rounded ones."""
    pytest.importorskip("bitsandbytes")
    run = extend_tiny(tmp_path, 1e-4, r=4, load_in_4bit=True)
    before = AutoModelForCausalLM.from_pretrained(model_location("builtin:tiny")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    assert before.keys() == after.keys()
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before}
    assert max(moved.values()) < 1e-3  # four bits are wrong by far more
    assert any(moved.values())
    assert "quantization_config" not in json.loads((run.model / "config.json").read_text())


def test_gradients_of_adapters_on_four_bit_weights_are_those_on_the_same_weights_in_full() -> None:
    """Also after an evaluation. Seen to fail where bitsandbytes packs weights for products without gradients."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = ModelConfig(path="builtin:tiny", dtype="float32")
    small, full = load_model(config, CPU, four_bits=True), load_model(config, CPU)
    for name, module in small.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            full.get_submodule(name).weight.data = weight.float()
    assert any("Linear4bit" in type(module).__name__ for module in small.modules())
    ids = torch.randint(1000, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small(ids)  # as an evaluation does
    gradients = []
    for model, four in ((small, True), (full, False)):
        torch.manual_seed(0)
        adapted = add_adapters(model, LoRAConfig(load_in_4bit=four)).train()
        window_loss(
            adapted, adapted, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        ).backward()
        gradients.append({n: w.grad for n, w in adapted.named_parameters() if w.requires_grad and "lora_B" in n})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_says_which_modules_there_are_not() -> None:
    with pytest.raises(UserError, match=r"target_modules must name linear layers of LlamaForCausalLM.*no query"):
        check_adapters(pico_llama(), LoRAConfig(target_modules=("q_proj", "query")))
    check_adapters(pico_llama(), LoRAConfig(target_modules=("q_proj", "v_proj")))


def test_first_weights_of_adapters_come_from_the_seed() -> None:
    """Whatever was drawn before."""
    seen = []
    for number, seed in enumerate((1, 1, 2)):
        torch.rand(number + 1)
        model = add_adapters(pico_llama(), LoRAConfig(r=4), seed)
        seen.append(next(weight for name, weight in model.named_parameters() if "lora_A" in name).detach())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
