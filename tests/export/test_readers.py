"""Every reader's rule, against Hugging Face code where there is some and by hand where not."""

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skipwise import NTK, Linear, RopeScaling, UserError, YaRN, set_rope_scaling
from skipwise.export.hf_config import completed_config
from skipwise.export.legacy import with_legacy_rope
from skipwise.export.readers import (
    READERS,
    UnreadableError,
    difference,
    llama_cpp,
    transformers_4,
    transformers_5,
    vllm,
)
from skipwise.models.families import family_of
from skipwise.rope.scaling import base_frequencies
from tests.picomodels import LENGTHS, picomodel

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 8192,
    "num_hidden_layers": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 2048,
    "short_factor": [1.0] * 16, "long_factor": [1.0 + number / 5 for number in range(16)],
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn, written out": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.1},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "longrope, written out": {**LONGROPE, "attention_factor": 1.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", ["new", "old", "both"])
def test_transformers_5_is_what_stock_code_computes(name: str, form: str) -> None:
    rope = {**OTHERS[name], "rope_theta": 50000.0}
    config: dict[str, Any] = {**BASE, "rope_parameters": rope}
    if form != "new":
        config = {**BASE, "rope_theta": 50000.0, "rope_scaling": OTHERS[name]}
    if form == "both":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    hf = LlamaRotaryEmbedding(LlamaConfig(**config))
    read = transformers_5(config)
    np.testing.assert_allclose(read.short, hf.inv_freq.double(), rtol=1e-5)
    assert read.attention_factor == pytest.approx(hf.attention_scaling)


def test_transformers_4_knows_the_old_form_only() -> None:
    """A file in the new form alone: theta and scaling are lost without a word."""
    config = {**BASE, "rope_parameters": {**YARN, "rope_theta": 500000.0}}
    read = transformers_4(config)
    assert (read.rope_type, read.theta, read.attention_factor) == ("default", 10000.0, 1.0)
    assert difference(read, transformers_5(config)) is not None
    both = {**config, "rope_theta": 500000.0, "rope_scaling": YARN}
    assert difference(transformers_4(both), transformers_5(both)) is None


@pytest.mark.parametrize(
    ("kind", "scaling", "code"),
    [
        ("olmo2", YaRN(), "reader_takes_few_keys"),
        ("olmo2", Linear(), None),
        ("phi3", YaRN(), "reader_takes_few_keys"),
        ("nemotron", Linear(), "reader_lacks_scaling"),
        ("nemotron", NTK(), None),
    ],
)
def test_transformers_4_has_classes_with_rules_of_their_own(kind: str, scaling: RopeScaling, code: str | None) -> None:
    """Seen with transformers 4.57.3: it stops at the first and the third, and leaves out the scaling of the fourth."""
    model = picomodel(family_of(kind))
    set_rope_scaling(model, scaling, LENGTHS)
    config = with_legacy_rope(model.config.to_dict())
    if code is None:
        assert difference(transformers_4(config), transformers_5(config)) is None
    else:
        with pytest.raises(UserError) as caught:
            transformers_4(config)
        assert caught.value.code == code
    assert difference(transformers_5(config), transformers_5(model.config.to_dict())) is None


def test_a_rope_scaling_of_phi_3_stays_as_it_was_published() -> None:
    """Its class of transformers 4 takes three keys, and reads the original window from beside them."""
    lists = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    published = {**BASE, "model_type": "phi3", "rope_scaling": {"type": "longrope", **lists}, "rope_theta": 10000.0}
    published["original_max_position_embeddings"] = published["max_position_embeddings"] // 4
    hf = completed_config(published)
    written = with_legacy_rope({key: value for key, value in hf.items() if key != "rope_scaling"})
    assert written["rope_scaling"] == {"type": "longrope", **lists}
    assert difference(transformers_4(written), transformers_5(published)) is None


def test_one_theta_for_all_layers() -> None:
    """transformers 4.57.3 computes windowed layers of a ModernBERT that is a decoder with the theta of the others."""
    tables = {"full_attention": {"rope_theta": 160000.0}, "sliding_attention": {"rope_theta": 10000.0}}
    for table in tables.values():
        table["rope_type"] = "default"  # type: ignore[assignment]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = with_legacy_rope({"model_type": "modernbert-decoder", **sizes, "rope_parameters": tables})
    assert transformers_4(config).sliding_theta == 160000.0 and transformers_5(config).sliding_theta == 10000.0


PLAIN = 10000.0 ** (-np.arange(16) / 16)


def frequencies_by_hand(rope: dict[str, Any]) -> Any:
    """Of vLLM's classes, for 32 rotated dimensions and a theta of 10,000."""
    match rope["rope_type"]:
        case "linear":
            return PLAIN / rope["factor"]
        case "yarn":
            low, high = (32 * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1))
            ramp = ((np.arange(16) - math.floor(low)) / (math.ceil(high) - math.floor(low))).clip(0, 1)
            return PLAIN / rope["factor"] * ramp + PLAIN * (1 - ramp)
        case "llama3":
            waves = 2 * math.pi / PLAIN
            smooth = (2048 / waves - 1) / (4 - 1)
            between = (1 - smooth) * PLAIN / 8 + smooth * PLAIN
            return np.where(waves < 2048 / 4, PLAIN, np.where(waves > 2048, PLAIN / 8, between))
        case "longrope":
            return PLAIN / np.array(rope["long_factor"])
    return PLAIN


@pytest.mark.parametrize(
    ("rope", "attention", "window"),
    [
        ({"rope_type": "default"}, 1.0, 8192),
        ({"rope_type": "linear", "factor": 4.0}, 1.0, 32768),  # takes the window for the one before
        (YARN, 0.1 * math.log(4) + 1, 8192),
        ({**YARN, "attention_factor": 1.3}, 1.3, 8192),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 8192),
        (LLAMA3, 1.0, 8192),
        # Ignores attention_factor, and has keys of its own.
        ({**LONGROPE, "attention_factor": 1.0}, math.sqrt(1 + math.log(4) / math.log(2048)), 8192),
        ({**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.0}, 1.0, 8192),
    ],
)
def test_vllm_by_its_own_rules(rope: dict[str, Any], attention: float, window: int) -> None:
    """By hand, from get_rope, YaRNScalingRotaryEmbedding, Phi3LongRoPEScaledRotaryEmbedding and the model config."""
    read = vllm({**BASE, "rope_parameters": {**rope, "rope_theta": 10000.0}})
    assert (read.attention_factor, read.window) == (pytest.approx(attention), window)
    np.testing.assert_allclose(read.long, frequencies_by_hand(rope), rtol=1e-12)


def test_vllm_keeps_one_list_for_all_texts() -> None:
    read = vllm({**BASE, "rope_parameters": {**LONGROPE, "rope_theta": 10000.0}})
    np.testing.assert_array_equal(read.short, read.long)
    with pytest.raises(UnreadableError, match="two attention factors"):
        vllm({**BASE, "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.2}})


def test_llama_cpp_has_its_own_attention_factor_and_no_lists() -> None:
    own = llama_cpp({**BASE, "rope_parameters": {**YARN, "rope_theta": 10000.0, "attention_factor": 1.3}})
    assert own.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    lost = llama_cpp({**BASE, "rope_parameters": {**LONGROPE, "rope_theta": 10000.0}})
    np.testing.assert_array_equal(lost.long, base_frequencies(32, 10000.0))
    legacy = llama_cpp({**BASE, "rope_theta": 70000.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    np.testing.assert_allclose(legacy.long, base_frequencies(32, 70000.0) / 2)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear"}, {"rope_type": "unheard"}, {"rope_type": "linear", "factor": "x"}]
)
def test_what_cannot_be_read_says_so(reader: str, rope: dict[str, Any]) -> None:
    config = {**BASE, "rope_theta": 10000.0, "rope_scaling": rope, "rope_parameters": rope}
    with pytest.raises(UserError):
        READERS[reader](config)


def test_a_difference_is_seen_at_a_millionth() -> None:
    near = {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    far = {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.1}}
    assert difference(transformers_5(near), transformers_5(near)) is None
    assert "apart" in str(difference(transformers_5(near), transformers_5(far)))
