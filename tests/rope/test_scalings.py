"""Frequencies against transformers' own functions and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
)
from skipwise.rope import ROPE_SCALINGS

SCALINGS: list[RopeScaling] = [
    NoScaling(),
    Linear(),
    NTK(),
    YaRN(),
    YaRN(beta_fast=8.0, beta_slow=0.5),
    YaRN(attention_factor=1.5),
    YaRNRevised(),
    AdjustedBase(theta=500_000.0),
    Mixed(),
    Mixed(beta_fast=4.0),
]
LENGTHS = [Lengths(2048, 2048, 16384), Lengths(8192, 1024, 32768), Lengths(256, 256, 4096), Lengths(4096, 512, 100_000)]


def test_every_scaling_is_tested() -> None:
    assert {type(s) for s in SCALINGS} == set(ROPE_SCALINGS)


def transformers_frequencies(
    parameters: dict[str, object], lengths: Lengths, head_dim: int
) -> tuple[np.ndarray, float]:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=lengths.target,
        rope_parameters=parameters,
    )
    if parameters["rope_type"] == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        # Of an input as long as the target, for those that make a difference.
        initialise = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])]
        inv_freq, factor = initialise(config, "cpu", seq_len=lengths.target)
    return inv_freq.double().numpy(), factor


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{x.original}-{x.target}")
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_transformers_computes_the_same(scaling: RopeScaling, lengths: Lengths, theta: float, head_dim: int) -> None:
    """What `hf_parameters` writes is read back as the same frequencies (float32 against float64)."""
    ours, factor = scaling.frequencies(head_dim, theta, lengths)
    assert ours.dtype == np.float64
    assert ours.shape == (head_dim // 2,)
    theirs, their_factor = transformers_frequencies(scaling.hf_parameters(head_dim, theta, lengths), lengths, head_dim)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert factor == pytest.approx(their_factor, rel=1e-9)


def test_linear_by_hand() -> None:
    """d = 4, theta = 10,000: 1 and 1/100, divided by alpha = 8."""
    frequencies, factor = Linear().frequencies(4, 10_000.0, Lengths(2, 2, 16))
    assert frequencies.tolist() == [0.125, 0.00125]
    assert factor == 1.0


def test_ntk_by_hand() -> None:
    """d = 4, alpha = 4: theta becomes 10,000 * 4^2 = 160,000, whose slow frequency is 1/400 = (1/100)/4."""
    frequencies, _ = NTK().frequencies(4, 10_000.0, Lengths(2, 2, 8))
    np.testing.assert_allclose(frequencies, [1.0, 0.0025], rtol=1e-12)
    assert NTK().hf_parameters(4, 10_000.0, Lengths(2, 2, 8)) == {
        "rope_type": "default",
        "rope_theta": pytest.approx(160_000.0),
    }
    with pytest.raises(UserError, match="above 2"):
        NTK().frequencies(2, 10_000.0, Lengths(2, 2, 8))


def test_yarn_by_hand() -> None:
    """LLaMA's d = 128 and theta = 10,000 at Lc = 2048: the ramp runs from dimension 16 to 41.

    ln(2048 / (32 * 2 pi)) = 2.3212 and ln(2048 / (2 pi)) = 5.7869; times 128 / (2 ln 10000) = 6.9487 that is
    16.13 and 40.21, rounded outwards. At j = 30 the ramp is 14/25 = 0.56, so the frequency
    10000^(-60/128) = 0.0133352 is scaled by 0.56/8 + 0.44 = 0.51, or divided by 0.56 * 8 + 0.44 = 4.92.
    """
    lengths = Lengths(2048, 2048, 16384)
    yarn, factor = YaRN().frequencies(128, 10_000.0, lengths)
    revised, revised_factor = YaRNRevised().frequencies(128, 10_000.0, lengths)
    plain = 10_000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(yarn[:17], plain[:17], rtol=1e-12)
    np.testing.assert_allclose(yarn[41:], plain[41:] / 8, rtol=1e-12)
    assert yarn[30] == pytest.approx(0.0133352 * 0.51, rel=1e-5)
    assert revised[30] == pytest.approx(0.0133352 / 4.92, rel=1e-5)
    assert factor == revised_factor == pytest.approx(1.2079442, abs=1e-7)  # 0.1 ln 8 + 1


def test_the_two_yarns_differ_inside_the_ramp_only() -> None:
    lengths = Lengths(2048, 2048, 16384)
    yarn, _ = YaRN().frequencies(128, 10_000.0, lengths)
    revised, _ = YaRNRevised().frequencies(128, 10_000.0, lengths)
    differ = np.flatnonzero(~np.isclose(yarn, revised, rtol=1e-9))
    assert differ.tolist() == list(range(17, 41))


def test_revised_yarn_never_goes_under_another_name() -> None:
    """Its attention factor is written out, since longrope's default is another one."""
    lengths = Lengths(2048, 2048, 16384)
    parameters = YaRNRevised().hf_parameters(128, 10_000.0, lengths)
    assert parameters["rope_type"] == "longrope"
    assert parameters["short_factor"] == parameters["long_factor"]
    default = math.sqrt(1 + math.log(8) / math.log(2048))
    assert abs(parameters["attention_factor"] - default) > 0.05


def test_rope_is_relative_and_angles_fit_in_float32() -> None:
    """Trap 7: float32 angles, as Hugging Face models compute them, stay within 0.01 rad at 128k."""
    frequencies, _ = YaRN().frequencies(64, 10_000.0, Lengths(2048, 2048, 131_072))
    positions = np.arange(0, 131_072, 997)
    exact = positions[:, None] * frequencies
    hf = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
    assert np.abs(exact - hf).max() < 0.01
    half = positions.astype(np.float32)  # what bfloat16 makes of positions: 8 bits of mantissa
    import torch

    rounded = torch.from_numpy(half).to(torch.bfloat16).double().numpy()
    assert np.abs(exact - rounded[:, None] * frequencies).max() > 1.0


@pytest.mark.parametrize("cls", [YaRN, YaRNRevised])
def test_impossible_ramps(cls: type[YaRN] | type[YaRNRevised]) -> None:
    with pytest.raises(UserError, match="beta_fast > beta_slow"):
        cls(beta_fast=1.0, beta_slow=2.0)
    for fast, slow in ((1e300, 1.0), (32.0, 5e-324)):  # a logarithm of them overflows
        with pytest.raises(UserError, match="beta_fast > beta_slow"):
            cls(beta_fast=fast, beta_slow=slow)


def test_impossible_attention_factor() -> None:
    with pytest.raises(UserError, match="above 0"):
        YaRN(attention_factor=0.0)


def test_impossible_theta() -> None:
    with pytest.raises(UserError, match="above 1"):
        AdjustedBase(theta=1.0)


def test_mixed_has_pretrainings_frequencies_for_what_fits_the_original_window() -> None:
    """As transformers reads it; beyond, YaRN's frequencies without its attention factor."""
    lengths = Lengths(2048, 2048, 16384)
    parameters = Mixed(beta_fast=8).hf_parameters(64, 10_000.0, lengths)
    config = LlamaConfig(head_dim=64, max_position_embeddings=16384, rope_parameters=parameters)
    short, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=2048)
    np.testing.assert_allclose(short.double().numpy(), NoScaling().frequencies(64, 10_000.0, lengths)[0], rtol=1e-6)
    assert factor == 1.0
    assert Mixed().short_frequencies(64, 10_000.0, lengths)[1] == 1.0
    yarn, _ = YaRN(beta_fast=8).frequencies(64, 10_000.0, lengths)
    np.testing.assert_allclose(Mixed(beta_fast=8).frequencies(64, 10_000.0, lengths)[0], yarn, rtol=1e-12)


def test_mixed_takes_factors_of_ones_own() -> None:
    lengths = Lengths(2, 2, 16)
    frequencies, _ = Mixed(long_factors=(1.0, 5.0)).frequencies(4, 10_000.0, lengths)
    assert frequencies.tolist() == [1.0, 0.002]
    with pytest.raises(UserError, match="one factor for each of the 2 pairs of dimensions, but has 3"):
        Mixed(long_factors=(1.0, 1.0, 2.0)).frequencies(4, 10_000.0, lengths)
    with pytest.raises(UserError, match="above 0"):
        Mixed(long_factors=(1.0, 0.0))


@pytest.mark.parametrize("scaling", [Mixed(), YaRNRevised()], ids=lambda s: s.name)
def test_vllm_gets_the_same_attention_factor(scaling: RopeScaling) -> None:
    """By its rule for longrope: the two mscales, or else a default that is neither of ours."""
    lengths = Lengths(2048, 2048, 16384)
    parameters = scaling.hf_parameters(64, 10_000.0, lengths)
    default = math.sqrt(1 + math.log(lengths.factor) / math.log(lengths.original))
    _, factor = scaling.frequencies(64, 10_000.0, lengths)
    read = [parameters.get(key, default) for key in ("short_mscale", "long_mscale")]
    assert read == [factor, factor]
    assert abs(default - factor) > 0.05
