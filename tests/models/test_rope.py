"""Setting the RoPE of Hugging Face models: tables and config together."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    Olmo3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from skipwise import NTK, Lengths, Linear, Mixed, NoScaling, UserError, YaRN, YaRNRevised, set_rope_scaling
from skipwise.config.files import parse_config
from skipwise.models.rope import live_rope, read_rope, with_full_table
from skipwise.models.skeleton import check_scaling
from skipwise.rope import RopeScaling
from tests.picomodels import FAMILY_SIZES, FAMILY_SPECIAL, PICO_MODELS, WINDOW, pico_llama
from tests.picotypes import small_config, small_model

LENGTHS = Lengths(original=WINDOW, train=WINDOW, target=16 * WINDOW)


@pytest.mark.parametrize("kind", PICO_MODELS)
@pytest.mark.parametrize("scaling", [YaRN(), YaRNRevised(), Linear(), NoScaling()], ids=lambda s: s.name)
def test_tables_and_config_follow(kind: str, scaling: RopeScaling) -> None:
    model = PICO_MODELS[kind]()
    before = read_rope(model.config)
    set_rope_scaling(model, scaling, LENGTHS)
    wanted, factor = scaling.frequencies(before.rotary_dim, before.theta, LENGTHS)
    tables = [m for m in model.modules() if hasattr(m, "inv_freq")]
    assert len(tables) == 1
    np.testing.assert_allclose(tables[0].inv_freq.numpy(), wanted, rtol=1e-5)
    assert tables[0].attention_scaling == pytest.approx(factor)
    assert model.config.max_position_embeddings == LENGTHS.target


@pytest.mark.parametrize("kind", PICO_MODELS)
def test_logits_change_with_the_scaling(kind: str) -> None:
    model = PICO_MODELS[kind]()
    ids = torch.arange(2, 42)[None]
    before = model(ids).logits
    set_rope_scaling(model, Linear(), LENGTHS)
    assert not torch.allclose(before, model(ids).logits, atol=1e-4)


def test_the_first_window_is_kept_through_two_extensions(llama: PreTrainedModel) -> None:
    """Trap 6. Seen to fail when `original_max_position_embeddings` was written as the current window."""
    set_rope_scaling(llama, YaRN(), LENGTHS)
    info = read_rope(llama.config)
    assert (info.original, info.current, info.rope_type) == (WINDOW, 16 * WINDOW, "yarn")
    longer = Lengths(original=info.original, train=WINDOW, target=64 * WINDOW)
    set_rope_scaling(llama, YaRN(), longer)
    assert llama.config.rope_parameters["original_max_position_embeddings"] == WINDOW
    assert llama.config.rope_parameters["factor"] == 64
    assert llama.config.max_position_embeddings == 64 * WINDOW


def test_a_model_scaled_linearly_before_keeps_its_first_window(llama: PreTrainedModel) -> None:
    """Trap 6: such a config says its factor only."""
    set_rope_scaling(llama, Linear(), LENGTHS)
    info = read_rope(llama.config)
    assert (info.original, info.current) == (WINDOW, 16 * WINDOW)
    set_rope_scaling(llama, Linear(), Lengths(info.original, WINDOW, 64 * WINDOW))
    assert llama.model.rotary_emb.inv_freq[0] == pytest.approx(1 / 64)


def test_a_yarn_config_that_left_its_window_behind() -> None:
    """As Qwen's cards advise: the factor tells the window, max_position_embeddings does not."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    info = read_rope(Qwen2Config(max_position_embeddings=32768, rope_scaling=scaling))
    assert (info.original, info.current) == (32768, 131072)


ONES, TWOS = [1.0] * 8, [2.0] * 8
EXTENDED_BEFORE: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64},
    "phi3": {"rope_type": "longrope", "short_factor": ONES, "long_factor": TWOS,
             "original_max_position_embeddings": 64},
    "gemma3_text": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXTENDED_BEFORE)
def test_what_published_models_were_extended_with_is_replaced(kind: str) -> None:
    """Llama 3.1, Phi-3 and Gemma 3, from a original window of 64 to 512: YaRN from the original window to 1,024."""
    rope = {**EXTENDED_BEFORE[kind], "rope_theta": 10000.0}
    near = {"rope_type": "default", "rope_theta": 5000.0}
    more: dict[str, Any] = {**FAMILY_SIZES, **FAMILY_SPECIAL.get(kind, {}), "max_position_embeddings": 512}
    if kind == "phi3":
        more["original_max_position_embeddings"] = 64
    tables = {"full_attention": rope, "sliding_attention": near} if kind == "gemma3_text" else rope
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more, rope_parameters=tables))
    assert (read_rope(model.config).original, read_rope(model.config).current) == (64, 512)
    lengths = Lengths(original=64, train=64, target=1024)
    set_rope_scaling(model, YaRN(), lengths)
    wanted, factor = YaRN().frequencies(16, 10000.0, lengths)
    live = live_rope(model, lengths)
    np.testing.assert_allclose(live["long"], wanted, rtol=1e-5)
    assert live["attention_factor"] == pytest.approx(factor)
    if kind == "gemma3_text":
        np.testing.assert_allclose(live["near"], 5000.0 ** (-np.arange(8) / 8), rtol=1e-5)
    assert (read_rope(model.config).original, read_rope(model.config).current) == (64, 1024)


def test_frequencies_do_not_depend_on_the_positions_of_a_batch(llama: PreTrainedModel) -> None:
    """Trap 4: revised YaRN is written as longrope, which switches lists by the largest position.

    Seen to fail when the long list was twice the short one.
    """
    set_rope_scaling(llama, YaRNRevised(), LENGTHS)
    table = llama.model.rotary_emb
    before = table.inv_freq.clone()
    for last in (10, WINDOW - 1, 16 * WINDOW - 1):
        llama(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), position_ids=torch.tensor([[0, last]]))
        assert torch.equal(table.inv_freq, before)


def test_dynamic_scaling_is_not_offered() -> None:
    """Trap 4: its frequencies would vary with the skips of a batch."""
    with pytest.raises(UserError, match="'dynamic' is not known"):
        parse_config({"model": {"path": "m"}, "lengths": {"target": 64}, "data": "d", "rope": "dynamic"})


def test_partial_rotation_is_kept() -> None:
    model = PICO_MODELS["gpt_neox"]()
    set_rope_scaling(model, YaRN(), LENGTHS)
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25


def test_a_table_that_does_not_follow_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is left as it was."""
    rotary = type(llama.model.rotary_emb)
    stubborn = type("StubbornRotary", (rotary,), {})

    def ignore_config(self: torch.nn.Module, config: object) -> None:
        from transformers import LlamaConfig

        rotary.__init__(self, LlamaConfig(head_dim=16))
        self.config = config

    stubborn.__init__ = ignore_config  # type: ignore[method-assign]
    llama.model.rotary_emb = stubborn(llama.config)
    with pytest.raises(UserError, match="rotary table") as caught:
        set_rope_scaling(llama, Linear(), LENGTHS)
    assert caught.value.code == "scaling_not_supported"
    assert llama.config.rope_parameters["rope_type"] == "default"
    assert llama.config.max_position_embeddings == WINDOW


def test_models_without_rope_are_refused() -> None:
    with pytest.raises(UserError, match="RoPE"):
        read_rope(GPT2Config())


@pytest.mark.parametrize("config_class", [Gemma3TextConfig, Olmo3Config])
def test_of_two_tables_the_far_one_is_read_and_set(config_class: type[PreTrainedConfig]) -> None:
    """Windowed layers meet no distance beyond their window, and keep their theta."""
    config = config_class(max_position_embeddings=WINDOW)
    near = dict(config.rope_parameters["sliding_attention"])
    info = read_rope(config)
    assert (info.theta, info.original) == (config.rope_parameters["full_attention"]["rope_theta"], WINDOW)
    parameters = with_full_table(config, YaRN(), LENGTHS)
    assert parameters["sliding_attention"] == near
    assert parameters["full_attention"]["factor"] == LENGTHS.factor


def test_none_of_several_tables_is_of_layers_that_see_far() -> None:
    config = Gemma3TextConfig()
    config.rope_parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UserError, match="several rotary tables"):
        read_rope(config)


def test_an_extension_stays_relative() -> None:
    """Shifting all positions by a constant changes nothing but rounding."""
    model = pico_llama()
    set_rope_scaling(model, YaRN(), LENGTHS)
    ids = torch.arange(2, 34)[None]
    mask = torch.ones_like(ids)
    positions = torch.arange(32)[None]
    near = model(ids, attention_mask=mask, position_ids=positions).logits
    far = model(ids, attention_mask=mask, position_ids=positions + 900).logits
    torch.testing.assert_close(near, far, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", PICO_MODELS)
def test_mixed_leaves_what_fits_the_original_window_as_it_was(kind: str) -> None:
    """By Hugging Face code: short inputs as by the untouched model, also after a long one; long ones as by YaRN."""
    untouched, mixed, yarn = (PICO_MODELS[kind]() for _ in range(3))
    for model in (mixed, yarn):
        model.load_state_dict(untouched.state_dict())
    set_rope_scaling(mixed, Mixed(beta_fast=4), LENGTHS)
    set_rope_scaling(yarn, YaRN(beta_fast=4, attention_factor=1.0), LENGTHS)
    short = torch.arange(2, 2 + WINDOW)[None] % 250
    long = torch.arange(2, 2 + 2 * WINDOW)[None] % 250
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(mixed(short).logits, untouched(short).logits, atol=1e-5)
            assert torch.allclose(mixed(long).logits, yarn(long).logits, atol=1e-5)
            assert not torch.allclose(mixed(long).logits, untouched(long).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("llama", None), ("phi3", None), ("gemma3_text", None), ("phimoe", "scaling_not_supported")],
)
def test_a_scaling_is_refused_before_weights_are_loaded(kind: str, code: str | None) -> None:
    config = small_config(kind)
    before = config.to_dict()
    with nullcontext() if code is None else pytest.raises(UserError) as refused:
        check_scaling(config, Mixed(beta_fast=4), LENGTHS, trust_remote_code=False)
    assert code is None or refused.value.code == code
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["granite_swa", "granitemoe_swa"])
def test_a_theta_for_each_layer_is_refused(kind: str) -> None:
    """Their tables are made from a list, and a new theta in `rope_parameters` would be lost when they are read back."""
    model = small_model(kind)
    before = model.config.to_dict()
    with pytest.raises(UserError) as refused:
        set_rope_scaling(model, NTK(), LENGTHS)
    assert refused.value.code == "rope_of_layers_apart"
    assert model.config.to_dict() == before


@pytest.mark.parametrize("scaling", [YaRN(), NTK(), Linear()], ids=lambda scaling: scaling.name)
def test_keys_of_a_family_are_kept(scaling: RopeScaling) -> None:
    """Ministral 3 scales its queries by them, from the original window on: without them its forward pass failed, after
    the untouched model had been evaluated.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": WINDOW}  # fmt: skip
    config = AutoConfig.for_model(
        "ministral3", hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=1, vocab_size=300, max_position_embeddings=WINDOW, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    set_rope_scaling(model, scaling, LENGTHS)
    parameters = model.config.rope_parameters
    assert parameters["llama_4_scaling_beta"] == 0.1
    assert parameters["original_max_position_embeddings"] == LENGTHS.original
    ids = torch.arange(3, 203)[None]
    assert torch.isfinite(model(ids, attention_mask=torch.ones_like(ids)).logits).all()
