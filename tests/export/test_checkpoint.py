"""What is written must be read the same by every reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from skipwise import (
    NTK,
    AdjustedBase,
    Lengths,
    Linear,
    Mixed,
    NoScaling,
    RopeScaling,
    UserError,
    YaRN,
    YaRNRevised,
    set_rope_scaling,
)
from skipwise.export import checkpoint
from skipwise.export.checkpoint import save_checkpoint
from skipwise.models.rope import read_rope
from tests.picomodels import PICO_MODELS, WINDOW, pico_llama
from tests.picotypes import small_model

LENGTHS = Lengths(original=WINDOW, train=WINDOW, target=512)
SCALINGS = [YaRN(), YaRNRevised(), Linear(), NTK(), AdjustedBase(theta=5e5), NoScaling(), Mixed(beta_fast=4)]


def written(
    kind: str, scaling: RopeScaling, path: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[Any, dict[str, Any]]:
    model = PICO_MODELS[kind]()
    set_rope_scaling(model, scaling, LENGTHS)
    save_checkpoint(model, tokenizer, path, LENGTHS, card="# card\n")
    return model, json.loads((path / "config.json").read_text())


def test_weights_may_be_read_by_whoever_reads_the_config(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    written("llama", YaRN(), tmp_path / "model", tokenizer)
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", PICO_MODELS)
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.name)
def test_stock_transformers_gives_the_same_logits(
    kind: str, scaling: RopeScaling, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = written(kind, scaling, tmp_path / "model", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(2, 258, (1, 300), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 512


@pytest.mark.parametrize("kind", PICO_MODELS)
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("reader", ["transformers 5", "rope_parameters only", "legacy only"])
def test_every_reader_finds_the_same_rope(
    kind: str, scaling: RopeScaling, reader: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 5. Seen to fail when `rope_theta` was left out, and when `rope_scaling` held only type and factor."""
    model, config = written(kind, scaling, tmp_path / "model", tokenizer)
    legacy = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"}
    if reader == "rope_parameters only":
        config = {key: value for key, value in config.items() if key not in legacy}
    elif reader == "legacy only":
        del config["rope_parameters"]
    loaded = type(model)(type(model.config)(**config))
    tables = [next(m for m in one.modules() if hasattr(m, "inv_freq")) for one in (loaded, model)]
    torch.testing.assert_close(tables[0].inv_freq, tables[1].inv_freq, rtol=1e-6, atol=0)
    assert tables[0].attention_scaling == pytest.approx(tables[1].attention_scaling)


def test_a_limit_of_generation_below_the_target_goes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama 2 has one; the doctor would find it wrong."""
    for limit, kept in ((64, None), (LENGTHS.target, LENGTHS.target)):
        model = pico_llama()
        set_rope_scaling(model, YaRN(), LENGTHS)
        model.generation_config.max_length = limit
        path = tmp_path / str(limit)
        save_checkpoint(model, tokenizer, path, LENGTHS, card="")
        assert json.loads((path / "generation_config.json").read_text()).get("max_length") == kept


def test_the_legacy_form_holds_what_older_readers_look_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trap 5 and 6, by the rule of a reader that knows neither `rope_parameters` nor `rope_type`."""
    _, config = written("llama", YaRN(), tmp_path / "model", tokenizer)
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["rope_scaling"]["original_max_position_embeddings"] == WINDOW
    assert config["max_position_embeddings"] == 512
    _, plain = written("llama", NTK(), tmp_path / "ntk", tokenizer)
    assert plain["rope_scaling"] is None
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"] > 10000.0


def test_a_model_extended_before_keeps_its_first_window(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trap 6, over a written checkpoint."""
    written("llama", YaRN(), tmp_path / "model", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    info = read_rope(again.config)
    assert (info.original, info.current) == (WINDOW, 512)
    longer = Lengths(original=info.original, train=WINDOW, target=2048)
    set_rope_scaling(again, YaRN(), longer)
    save_checkpoint(again, tokenizer, tmp_path / "again", longer, card="")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["rope_scaling"]["original_max_position_embeddings"] == WINDOW
    assert config["max_position_embeddings"] == 2048


def test_a_config_that_reads_back_differently_is_not_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.with_legacy_rope

    def poorer(config: dict[str, Any]) -> dict[str, Any]:
        out = real(config)
        return {**out, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.0}}

    monkeypatch.setattr(checkpoint, "with_legacy_rope", poorer)
    with pytest.raises(UserError, match="give back the rotary table"):
        written("llama", YaRN(), tmp_path / "model", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_legacy_only_configs_are_read(tmp_path: Path) -> None:
    """A model in the old form, as most on the hub are."""
    config = LlamaConfig(
        rope_theta=1e6,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        max_position_embeddings=16384,
        head_dim=64,
    )
    info = read_rope(config)
    assert (info.theta, info.original, info.current, info.rope_type) == (1e6, 4096, 16384, "yarn")


@pytest.mark.parametrize("kind", ["mellum", "laguna", "cohere_compass_text", "mimo_v2_flash", "gemma3_text"])
def test_tables_for_each_kind_of_layer_survive_the_older_form(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    """Where a class is newer than that form, it takes it for the parameters of all layers: then it is not written."""
    model, lengths = small_model(kind), Lengths(original=64, train=64, target=512)
    set_rope_scaling(model, YaRN(), lengths)
    save_checkpoint(model, tokenizer, tmp_path / "model", lengths, card="")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    read = AutoConfig.from_pretrained(tmp_path / "model")
    assert read.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert written["rope_parameters"]["full_attention"]["factor"] == 8
    assert ("rope_scaling" in written) is (kind == "gemma3_text")
