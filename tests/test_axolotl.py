"""The plugin for Axolotl: its hooks on a small model, and where Axolotl is installed, Axolotl itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

from skipwise import UserError, load_adapter
from skipwise.axolotl import SkipwisePlugin
from skipwise.models.locate import model_location

TINY = model_location("builtin:tiny")
EXAMPLE = Path(__file__).parent.parent / "examples" / "axolotl.yaml"


def configuration(**changes: Any) -> dict[str, Any]:
    return {"sequence_len": 128, "micro_batch_size": 2, "skipwise": {"lengths": {"target": "2k"}}, **changes}


def prepared(model: torch.nn.Module, cfg: dict[str, Any], rows: list[dict[str, Any]], directory: Path) -> Trainer:
    """The hooks in Axolotl's order."""
    plugin = SkipwisePlugin()
    plugin.register(cfg)
    plugin.post_model_build(cfg, model)
    plugin.post_model_load(cfg, model)
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, max_steps=2, use_cpu=True, report_to="none"
    )
    data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(TINY)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    plugin.post_trainer_create(cfg, trainer)
    return trainer


def plain_rows(length: int = 128) -> list[dict[str, Any]]:
    return [{"input_ids": [*range(n, n + length)], "labels": [*range(n, n + length)]} for n in range(4)]


def test_batches_are_windows_with_new_skips_at_every_visit(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    trainer = prepared(model, configuration(), plain_rows(), tmp_path)
    assert model.config.max_position_embeddings == 2048
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.rope_parameters["original_max_position_embeddings"] == 256
    drawn = [batch["position_ids"] for _ in range(8) for batch in trainer.get_train_dataloader()]
    positions = torch.cat(drawn)
    assert 1024 < positions.max() < 2048
    with_skips = positions[(positions.diff(dim=-1) != 1).any(dim=-1)]
    assert len(with_skips.unique(dim=0)) == len(with_skips) > len(positions) / 2  # none comes twice
    assert len(with_skips) < len(positions)  # a share is left untouched
    before = model.lm_head.weight.detach().clone()
    assert trainer.train().training_loss < 20
    assert not torch.equal(before, model.lm_head.weight)


def test_evaluation_draws_the_same_windows_again(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    trainer = prepared(model, configuration(), plain_rows(), tmp_path)
    once, again = (trainer.eval_data_collator(plain_rows())["position_ids"] for _ in range(2))  # type: ignore[attr-defined]
    assert torch.equal(once, again) and len(once.unique(dim=0)) == 4


def test_of_a_longer_row_all_pieces_come_up_and_each_has_a_loss(tmp_path: Path) -> None:
    rows = [{"input_ids": [*range(1000)], "labels": [-100] * 900 + [*range(900, 1000)]}] * 2
    cfg = configuration(sequence_len=1000, skipwise={"lengths": {"target": "2k", "train": 128}})
    trainer = prepared(AutoModelForCausalLM.from_pretrained(TINY), cfg, rows, tmp_path)
    batches = [trainer.data_collator(rows) for _ in range(40)]
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    assert ids.shape == (80, 128)
    assert (labels != -100).any(dim=-1).all()
    assert torch.equal(labels != -100, ids >= 900)
    assert ids.min() < 800 and ids.max() == 999


@pytest.mark.parametrize("by_kind", [False, True])
def test_windowed_layers_are_masked_by_distance(by_kind: bool, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 64,
    }  # fmt: skip
    if by_kind:
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=layers))
    else:
        model = MistralForCausalLM(MistralConfig(**sizes))
    cfg = configuration(skipwise={"lengths": {"target": 2048}, "untouched_share": 0.0})
    trainer = prepared(model, cfg, plain_rows(), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    near, positions = batch["attention_mask"], batch["position_ids"]
    if by_kind:
        assert near["full_attention"] is None
        near = near["sliding_attention"]
    distance = positions[:, :, None] - positions[:, None, :]
    assert torch.equal(near[:, 0], (distance >= 0) & (distance < 64))
    assert trainer.train().training_loss < 20


def test_rows_that_are_too_short_are_left_out(tmp_path: Path) -> None:
    cfg = configuration()
    SkipwisePlugin().register(cfg)
    assert cfg["min_sample_len"] == 128 and "merge_method" not in cfg
    whole = configuration(sequence_len=2048, skipwise={"lengths": {"target": "2k", "train": 128}, "positions": "full"})
    SkipwisePlugin().register(whole)
    assert whole["min_sample_len"] == 2048
    with pytest.raises(UserError, match="cut from 128 tokens, but a row of the prepared data set has 100"):
        prepared(AutoModelForCausalLM.from_pretrained(TINY), cfg, plain_rows() + plain_rows(100), tmp_path)


def test_a_merge_keeps_the_rope() -> None:
    cfg = configuration(adapter="lora")
    SkipwisePlugin().register(cfg)
    assert cfg["merge_method"] == "legacy"
    with pytest.raises(UserError, match="memory_efficient copies the config of the base"):
        SkipwisePlugin().register(configuration(adapter="lora", merge_method="memory_efficient"))


def test_an_adapter_carries_the_rope(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cfg = configuration(adapter="lora", output_dir=str(tmp_path))
    plugin, model = SkipwisePlugin(), AutoModelForCausalLM.from_pretrained(TINY)
    plugin.post_model_build(cfg, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    plugin.post_train(cfg, adapted)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(TINY), tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.max_position_embeddings == 2048


def test_a_model_that_was_extended_so_is_left_as_it_is() -> None:
    model, cfg = AutoModelForCausalLM.from_pretrained(TINY), configuration()
    SkipwisePlugin().post_model_build(cfg, model)
    parameters = dict(model.config.rope_parameters)
    SkipwisePlugin().post_model_build(cfg, model)
    assert model.config.rope_parameters == parameters
    with pytest.raises(UserError, match="must be above the model's window of 2,048"):
        SkipwisePlugin().post_model_build(configuration(skipwise={"lengths": {"target": "2k"}, "rope": "ntk"}), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skipwise": None}, r"skipwise: \{lengths: \{target: 32k\}\}"),
        ({"skipwise": "32k"}, "the section skipwise is '32k'"),
        ({"sequence_len": None, "skipwise": {"lengths": {"target": 256}}}, "512 > 256"),
        ({"skipwise": {"lengths": {"target": "2k"}, "positions": {"chunks": 200}}}, "one token per chunk"),
        ({"deepspeed": "zero3.json"}, "skipwise extend can shard"),
        ({"sample_packing": True}, "sample_packing packs texts"),
        ({"use_pose": True}, "use_pose is another collator"),
        ({"rl": "dpo"}, "rl has batches of its own, so it cannot be 'dpo'"),
        ({"skipwise": {"lengths": {"target": "2k"}, "positions": "full"}}, "Set sequence_len to 2048"),
        ({"skipwise": {"lengths": {"target": "2k"}, "position": "pose"}}, "position.*Did you mean"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SkipwisePlugin().register(configuration(**changes))


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_axolotl_trains_the_example_with_skips(
    adapter: str | None, tmp_path: Path, largest_positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    train = pytest.importorskip("axolotl.cli.train")
    from axolotl.cli.merge_lora import do_cli as merge

    monkeypatch.chdir(tmp_path)
    text = "It was a fine day, and number 12 of the list was done. " * 60
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(8)))
    cfg = yaml.safe_load(EXAMPLE.read_text()) | {"base_model": TINY, "sequence_len": 128, "max_steps": 4, "bf16": False}
    cfg |= {"dataloader_num_workers": 0}  # so that windows are drawn in this process
    cfg["skipwise"]["lengths"]["target"] = "1k"
    cfg |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # these need a GPU
    cfg["adapter"] = adapter
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    train.do_cli("config.yaml")
    assert len(largest_positions) >= 4 and max(largest_positions) > 256
    if adapter:
        merge("config.yaml", lora_model_dir="out")
    trained = AutoConfig.from_pretrained(tmp_path / "out" / ("merged" if adapter else ""))
    assert trained.max_position_embeddings == 1024 and trained.rope_parameters["rope_type"] == "yarn"
