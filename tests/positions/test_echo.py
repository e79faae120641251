"""Echoes: causal masks under which a window with skips has the attention mass of the text it stands for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from skipwise import Lengths, PoSE
from skipwise.positions import Document, echo_mask, example_rng

ONE_SKIP = np.repeat([0, 3840], 128)


def missing_in(window: int, chunks: int, seed: int) -> NDArray[np.int64]:
    lengths = Lengths(window, window, 16 * window)
    drawn = PoSE(chunks=chunks).sample(Document(window), lengths, example_rng(seed, 0, 0))
    return drawn.position_ids - np.arange(window)


@given(window=st.integers(4, 200), chunks=st.integers(1, 4), seed=st.integers(0, 1000))
def test_an_echo_is_causal_and_only_across_a_skip(window: int, chunks: int, seed: int) -> None:
    missing = missing_in(window, chunks, seed)
    mask = echo_mask(missing, np.random.default_rng(seed))
    query, key = np.indices((window, window))
    assert mask.shape == (window, window)
    assert (mask[key > query] == -np.inf).all()
    no_skip_between = (key <= query) & (missing[query] == missing[key])
    assert (mask[no_skip_between] == 0).all()
    assert (mask[key <= query] >= 0).all()
    assert (mask[:, 0] == 0).all()  # a text begins only once


@given(window=st.integers(4, 200), chunks=st.integers(1, 4), seed=st.integers(0, 1000))
def test_no_token_weighs_more_than_its_true_context(window: int, chunks: int, seed: int) -> None:
    """At most what is there and what is missing before the query: `position + 1` tokens."""
    missing = missing_in(window, chunks, seed)
    mass = np.exp(echo_mask(missing, np.random.default_rng(seed))).sum(axis=1)
    positions = missing + np.arange(window)
    assert (mass >= np.arange(window) + 1 - 1e-3).all()
    assert (mass <= (positions + 1) * (1 + 1e-5)).all()


def test_the_mass_reaches_up_to_that_of_the_text_left_out() -> None:
    """Two chunks of 128 tokens, 4,096 in all: the last token weighs its keys like 256 to 4,096 of them."""
    masses = [np.exp(echo_mask(ONE_SKIP, np.random.default_rng(seed))[-1]).sum() for seed in range(2000)]
    assert min(masses) == pytest.approx(256, rel=0.1)
    assert 3500 < max(masses) < 4097
    # By hand: 64 of 128 far keys echo; the median of u is sqrt(1/2).
    assert np.median(masses) == pytest.approx(192 + 64 * (1 + 3840 / 64) ** 0.5**0.5, rel=0.1)


def test_half_of_the_keys_across_the_skip_do_not_echo() -> None:
    mask = np.stack([echo_mask(ONE_SKIP, np.random.default_rng(seed))[-1] for seed in range(200)])
    blocks = mask[:, 16:128].reshape(200, -1, 16) > 0
    assert (blocks.all(axis=2) == blocks.any(axis=2)).all()  # whole blocks
    assert 0.4 < blocks.mean() < 0.6
