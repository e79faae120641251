"""The plugin for Axolotl: its hooks on a small model, and where Axolotl is installed, Axolotl itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

from skipwise import UserError, WindowCollator
from skipwise.axolotl import SkipwisePlugin
from skipwise.models.locate import model_location

TINY = model_location("builtin:tiny")
EXAMPLE = Path(__file__).parent.parent / "examples" / "axolotl.yaml"


def configuration(**changes: Any) -> dict[str, Any]:
    return {"sequence_len": 128, "micro_batch_size": 2, "skipwise": {"lengths": {"target": "2k"}}, **changes}


def trainer_of(model: torch.nn.Module, rows: list[dict[str, Any]], directory: Path) -> Trainer:
    arguments = TrainingArguments(str(directory), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    return Trainer(model, arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(TINY))


def prepared(model: torch.nn.Module, cfg: dict[str, Any], rows: list[dict[str, Any]], directory: Path) -> Trainer:
    """The hooks in Axolotl's order."""
    plugin = SkipwisePlugin()
    plugin.register(cfg)
    plugin.post_model_build(cfg, model)
    plugin.post_model_load(cfg, model)
    trainer = trainer_of(model, rows, directory)
    plugin.post_trainer_create(cfg, trainer)
    return trainer


def test_batches_are_windows_with_new_skips_at_every_visit(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    rows = [{"input_ids": list(range(128)), "labels": [-100] * 28 + list(range(28, 128))}] * 4
    trainer = prepared(model, configuration(), rows, tmp_path)
    assert model.config.max_position_embeddings == 2048
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.rope_parameters["original_max_position_embeddings"] == 256
    drawn = [batch for _ in range(8) for batch in trainer.get_train_dataloader()]
    positions = torch.cat([batch["position_ids"] for batch in drawn])
    assert 1024 < positions.max() < 2048
    with_skips = positions[(positions.diff(dim=-1) != 1).any(dim=-1)]
    assert len(with_skips) > len(with_skips.unique(dim=0)) - 1 > len(with_skips) / 2  # drawn anew
    assert len(with_skips) < len(positions)  # a share is left untouched
    labels, ids = (torch.cat([batch[key] for batch in drawn]) for key in ("labels", "input_ids"))
    assert (labels[ids < 28] == -100).all() and (labels[ids >= 28] == ids[ids >= 28]).all()
    trainer.train()


def test_windowed_layers_are_masked_by_distance(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=64,
    )  # fmt: skip
    rows = [{"input_ids": list(range(128)), "labels": list(range(128))}] * 2
    cfg = configuration(skipwise={"lengths": {"target": 2048}, "untouched_share": 0.0})
    trainer = prepared(MistralForCausalLM(config), cfg, rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    near, positions = batch["attention_mask"], batch["position_ids"]
    far = positions[:, :, None] - positions[:, None, :] >= 64
    assert near.shape == (2, 1, 128, 128) and not near[:, 0][far].any()


def test_rows_that_are_too_short_are_left_out_and_a_merge_keeps_the_rope() -> None:
    cfg = configuration()
    SkipwisePlugin().register(cfg)
    assert (cfg["min_sample_len"], cfg["merge_method"]) == (128, "legacy")
    whole = configuration(sequence_len=2048, skipwise={"lengths": {"target": "2k", "train": 128}, "positions": "full"})
    SkipwisePlugin().register(whole)
    assert whole["min_sample_len"] == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skipwise": None}, r"skipwise: \{lengths: \{target: 32k\}\}"),
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


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_axolotl_trains_the_example_with_skips(
    adapter: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train = pytest.importorskip("axolotl.cli.train")
    from axolotl.cli.merge_lora import do_cli as merge

    largest: list[int] = []
    draw = WindowCollator.__call__

    def watched(self: WindowCollator, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = draw(self, features)
        largest.append(int(batch["position_ids"].max()))
        return batch

    monkeypatch.setattr(WindowCollator, "__call__", watched)
    monkeypatch.chdir(tmp_path)
    text = "It was a fine day, and number 12 of the list was done. " * 60
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(8)))
    cfg = yaml.safe_load(EXAMPLE.read_text()) | {"base_model": TINY, "sequence_len": 128, "max_steps": 4, "bf16": False}
    cfg |= {"dataloader_num_workers": 0}  # so that windows are drawn in this process
    cfg["skipwise"]["lengths"]["target"] = "1k"
    if adapter:
        kernels = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # these need a GPU
        cfg |= {"adapter": adapter, "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **kernels}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    train.do_cli("config.yaml")
    assert len(largest) >= 4 and max(largest) > 256
    if adapter:
        merge("config.yaml", lora_model_dir="out")
    trained = AutoConfig.from_pretrained(tmp_path / "out" / ("merged" if adapter else ""))
    assert trained.max_position_embeddings == 1024 and trained.rope_parameters["rope_type"] == "yarn"
