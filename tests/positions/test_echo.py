"""Echoes: causal masks under which a short window has the attention mass of a long text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipwise import Lengths, PoSE
from skipwise.positions import Document, echo_mask, example_rng
from skipwise.positions.echo import NEAR


@given(n=st.integers(1, 200), skip=st.integers(0, 100_000), seed=st.integers(0, 1000))
def test_an_echo_is_causal_and_spares_what_is_near(n: int, skip: int, seed: int) -> None:
    mask = echo_mask(np.full(n, skip), np.random.default_rng(seed))
    query, key = np.indices((n, n))
    assert mask.shape == (n, n)
    assert (mask[key > query] == -np.inf).all()
    assert (mask[(key <= query) & (query - key <= NEAR)] == 0).all()
    assert (mask[key <= query] >= 0).all()


@given(seed=st.integers(0, 1000))
def test_tokens_before_the_skip_see_an_ordinary_window(seed: int) -> None:
    """A query echoes by what is missing before it, and before the first skip nothing is."""
    window = PoSE().sample(Document(256), Lengths(256, 256, 4096), example_rng(seed, 0, 0), 0.0)
    missing = window.position_ids - np.arange(256)
    mask = echo_mask(missing, np.random.default_rng(seed))
    ordinary = np.tril(np.ones((256, 256), dtype=bool))
    before = missing == 0
    assert (mask[before] == np.where(ordinary, 0.0, -np.inf)[before]).all()


def test_the_mass_reaches_up_to_that_of_the_text_left_out() -> None:
    """256 tokens at the end of 4,096: the last one weighs its keys like 256 to 4,096 of them."""
    masses = []
    for seed in range(2000):
        last = echo_mask(np.full(256, 4096 - 256), np.random.default_rng(seed))[-1]
        masses.append(np.exp(last).sum())
    assert min(masses) == pytest.approx(256, rel=0.1)
    assert 3500 < max(masses) < 4097
    # By hand: 116 of 232 far keys echo, 128 of all; the median of u is sqrt(1/2).
    assert np.median(masses) == pytest.approx(140 + 116 * (1 + 3840 / 128) ** 0.5**0.5, rel=0.1)


def test_half_of_the_far_keys_do_not_echo() -> None:
    mask = np.stack([echo_mask(np.full(256, 3840), np.random.default_rng(seed))[-1] for seed in range(200)])
    assert 0.4 < (mask[:, : 256 - NEAR - 1] > 0).mean() < 0.6
    blocks = mask[:, 16:224].reshape(200, -1, 16) > 0
    assert (blocks.all(axis=2) == blocks.any(axis=2)).all()  # whole blocks
    assert (mask[:, 0] == 0).all()  # a text begins only once
