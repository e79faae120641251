"""Every sampler, whatever its kind: what a window must be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipwise import Document, FullLength, Lengths, Plain, PoSE, PositionSampler, RandPos, UserError
from skipwise.positions import SAMPLERS, example_rng

VARIANTS: list[PositionSampler] = [
    *(PoSE(chunks=n, content=content) for n in (1, 2, 3, 7) for content in ("contiguous", "uniform", "aligned")),
    PoSE(first_chunk="half"),
    RandPos(),
    FullLength(),
    Plain(),
]


def test_every_sampler_is_among_the_variants() -> None:
    assert {type(v) for v in VARIANTS} == set(SAMPLERS)


@st.composite
def cases(draw: st.DrawFn) -> tuple[PositionSampler, Lengths, Document, tuple[int, int, int]]:
    sampler = draw(st.sampled_from(VARIANTS))
    train = draw(st.integers(7, 40))
    target = draw(st.integers(train, 400))
    lengths = Lengths(original=draw(st.integers(1, 64)), train=train, target=target)
    tokens = sampler.tokens_needed(lengths) + draw(st.integers(0, 300))
    visit = draw(st.tuples(st.integers(0, 2**31), st.integers(0, 50), st.integers(0, 10**6)))
    return sampler, lengths, Document(num_tokens=tokens), visit


@given(cases())
@settings(max_examples=400, deadline=None)
def test_a_window_is_well_formed(case: tuple[PositionSampler, Lengths, Document, tuple[int, int, int]]) -> None:
    sampler, lengths, document, visit = case
    window = sampler.sample(document, lengths, example_rng(*visit), progress=0.5)
    n = lengths.target if sampler.name == "full" else lengths.train
    for values, bound in ((window.position_ids, lengths.target), (window.token_index, document.num_tokens)):
        assert values.dtype == np.int64
        assert values.shape == (n,)
        assert (np.diff(values) > 0).all()
        assert values[-1] < bound
    assert window.position_ids[0] == 0
    assert window.token_index[0] >= 0
    again = sampler.sample(document, lengths, example_rng(*visit), progress=0.5)
    assert (again.position_ids == window.position_ids).all()
    assert (again.token_index == window.token_index).all()


@given(cases())
@settings(max_examples=200, deadline=None)
def test_tokens_used_bounds_what_a_long_document_contributes(
    case: tuple[PositionSampler, Lengths, Document, tuple[int, int, int]],
) -> None:
    sampler, lengths, _, visit = case
    used = sampler.tokens_used(lengths)
    assert used >= sampler.tokens_needed(lengths)
    window = sampler.sample(Document(num_tokens=used), lengths, example_rng(*visit), progress=0.0)
    assert window.token_index[-1] < used


@pytest.mark.parametrize("other", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 256, 0)])
def test_other_visits_use_other_random_streams(other: tuple[int, int, int, int]) -> None:
    draws = example_rng(0, 0, 0).integers(2**62, size=4)
    assert not np.intersect1d(draws, example_rng(*other).integers(2**62, size=4)).size


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("first_chunk", ["any", "half"])
def test_pose_reaches_every_distance_of_the_target(chunks: int, first_chunk: str) -> None:
    if first_chunk == "half" and chunks != 2:
        with pytest.raises(UserError, match="two chunks"):
            PoSE(chunks=chunks, first_chunk="half")
        return
    lengths, seen = Lengths(original=8, train=8, target=20), set()
    sampler = PoSE(chunks=chunks, first_chunk=first_chunk)
    for index in range(4000):
        ids = sampler.sample(Document(8), lengths, example_rng(0, 0, index), 0.0).position_ids
        seen |= set((ids[:, None] - ids[None, :])[np.tril_indices(8, -1)].tolist())
    assert seen == set(range(1, 20))


def enumerate_two_chunks(train: int, target: int, cuts: range) -> Counter[tuple[int, ...]]:
    """Every outcome of two-chunk PoSE with its weight, from the paper's description."""
    return Counter(
        tuple(range(cut)) + tuple(range(cut + skip, train + skip)) for cut in cuts for skip in range(target - train + 1)
    )


@pytest.mark.parametrize(("first_chunk", "cuts"), [("any", range(1, 6)), ("half", range(1, 4))])
def test_two_chunks_have_the_distribution_of_the_paper(first_chunk: str, cuts: range) -> None:
    lengths, draws = Lengths(original=6, train=6, target=10), 20_000
    sampler = PoSE(first_chunk=first_chunk)
    seen = Counter(
        tuple(sampler.sample(Document(6), lengths, example_rng(1, 0, i), 0.0).position_ids.tolist())
        for i in range(draws)
    )
    expected = enumerate_two_chunks(6, 10, cuts)
    total = sum(expected.values())
    assert set(seen) <= set(expected)
    for ids, weight in expected.items():
        share = weight / total
        assert abs(seen[ids] / draws - share) < 5 * (share / draws) ** 0.5


def test_later_skips_are_uniform_from_the_one_before() -> None:
    """u_2 given u_1 = k is uniform on {k, ..., Lt - Lw}: the sequential draw of Eq. 4."""
    lengths = Lengths(original=3, train=3, target=7)
    sampler, draws = PoSE(chunks=3), 30_000
    skips = Counter()
    for i in range(draws):
        ids = sampler.sample(Document(3), lengths, example_rng(2, 0, i), 0.0).position_ids
        skips[int(ids[1] - 1), int(ids[2] - 2)] += 1
    for first in range(5):
        for second in range(first, 5):
            share = 1 / 5 * 1 / (5 - first)
            assert abs(skips[first, second] / draws - share) < 5 * (share / draws) ** 0.5
    assert all(first <= second for first, second in skips)


def test_content_modes() -> None:
    lengths, document = Lengths(original=8, train=8, target=64), Document(num_tokens=200)
    for index in range(50):
        rng = [example_rng(0, 0, index) for _ in range(3)]
        contiguous = PoSE(chunks=3).sample(document, lengths, rng[0], 0.0)
        aligned = PoSE(chunks=3, content="aligned").sample(document, lengths, rng[1], 0.0)
        uniform = PoSE(chunks=3, content="uniform").sample(document, lengths, rng[2], 0.0)
        assert contiguous.token_index.tolist() == list(range(8))
        assert (aligned.token_index == aligned.position_ids).all()
        assert uniform.token_index[0] == 0  # v_0 = 0
        # Within a chunk, text and positions run on together (Eq. 3 and 5).
        chunk = np.arange(3).repeat(PoSE(chunks=3)._chunk_sizes(8, example_rng(0, 0, index)))
        assert len(chunk) == 8
        for shift in (uniform.token_index - np.arange(8), uniform.position_ids - np.arange(8)):
            assert [len(set(shift[chunk == i])) for i in range(3)] == [1, 1, 1]
    assert PoSE(content="aligned").tokens_needed(lengths) == 64


def test_randpos_is_a_shifted_sorted_sample() -> None:
    lengths, draws = Lengths(original=3, train=3, target=5), 20_000
    seen = Counter(
        tuple(RandPos().sample(Document(3), lengths, example_rng(3, 0, i), 0.0).position_ids.tolist())
        for i in range(draws)
    )
    from itertools import combinations

    expected = Counter(tuple(x - s[0] for x in s) for s in combinations(range(5), 3))
    assert set(seen) == set(expected)
    for ids, weight in expected.items():
        assert abs(seen[ids] / draws - weight / 10) < 5 * (weight / 10 / draws) ** 0.5


def test_too_few_tokens_for_the_chunks() -> None:
    with pytest.raises(UserError, match=r"one token per chunk.*4.*5 chunks.*positions.chunks"):
        PoSE(chunks=5).check(Lengths(original=4, train=4, target=8))


@pytest.mark.parametrize(
    "arguments", [{"original": 0, "train": 1, "target": 2}, {"original": 4, "train": 9, "target": 8}]
)
def test_impossible_lengths(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Lengths(**arguments)
