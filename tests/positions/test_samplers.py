"""Every sampler, whatever its kind: what a window must be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipwise import (
    CREAM,
    Document,
    FullLength,
    Lengths,
    LongRecipe,
    Matched,
    Plain,
    PoSE,
    PositionSampler,
    RandPos,
    UserError,
)
from skipwise.positions import SAMPLERS, example_rng

VARIANTS: list[PositionSampler] = [
    *(PoSE(chunks=n, content=content) for n in (1, 2, 3, 7) for content in ("contiguous", "uniform", "aligned")),
    PoSE(first_chunk="half"),
    PoSE(chunks=3, skips="sorted"),
    RandPos(),
    FullLength(),
    Plain(),
    CREAM(edge=2),
    CREAM(edge=2, spread=0.3),
    LongRecipe(),
    LongRecipe(start="sentence"),
    Matched(),
    Matched(cut="any"),
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
    boundaries = sorted(draw(st.sets(st.integers(0, tokens - 1), max_size=12)))
    return sampler, lengths, Document(tokens, boundaries), visit


@given(cases())
@settings(max_examples=400, deadline=None)
def test_a_window_is_well_formed(case: tuple[PositionSampler, Lengths, Document, tuple[int, int, int]]) -> None:
    sampler, lengths, document, visit = case
    window = sampler.sample(document, lengths, example_rng(*visit))
    n = lengths.target if isinstance(sampler, FullLength) else lengths.train
    assert sampler.window_length(lengths) == n
    assert sampler.has_skips or (np.diff(window.position_ids) == 1).all()
    for values, bound in ((window.position_ids, lengths.target), (window.token_index, document.num_tokens)):
        assert values.dtype == np.int64
        assert values.shape == (n,)
        assert (np.diff(values) > 0).all()
        assert values[-1] < bound
    assert window.position_ids[0] == 0
    assert window.token_index[0] >= 0
    again = sampler.sample(document, lengths, example_rng(*visit))
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
    window = sampler.sample(Document(num_tokens=used), lengths, example_rng(*visit))
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
        ids = sampler.sample(Document(8), lengths, example_rng(0, 0, index)).position_ids
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
        tuple(sampler.sample(Document(6), lengths, example_rng(1, 0, i)).position_ids.tolist()) for i in range(draws)
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
        ids = sampler.sample(Document(3), lengths, example_rng(2, 0, i)).position_ids
        skips[int(ids[1] - 1), int(ids[2] - 2)] += 1
    for first in range(5):
        for second in range(first, 5):
            share = 1 / 5 * 1 / (5 - first)
            assert abs(skips[first, second] / draws - share) < 5 * (share / draws) ** 0.5
    assert all(first <= second for first, second in skips)


def test_sorted_skips_are_spread_evenly() -> None:
    """Each pair of skips in order is twice as likely as two equal ones, and none leans to the right."""
    lengths = Lengths(original=3, train=3, target=7)
    sampler, draws = PoSE(chunks=3, skips="sorted"), 30_000
    skips = Counter()
    for i in range(draws):
        ids = sampler.sample(Document(3), lengths, example_rng(2, 0, i)).position_ids
        skips[int(ids[1] - 1), int(ids[2] - 2)] += 1
    for first in range(5):
        for second in range(first, 5):
            share = (1 if first == second else 2) / 25
            assert abs(skips[first, second] / draws - share) < 5 * (share / draws) ** 0.5
    assert sum(skips.values()) == sum(n for pair, n in skips.items() if pair[0] <= pair[1])


def test_cream_moves_its_middle_between_head_and_tail() -> None:
    """Head and tail keep their places; where the middle ends has the moments of a Gaussian that is cut off."""
    lengths, sampler = Lengths(original=30, train=30, target=430), CREAM(edge=4, spread=0.3)
    skips: dict[int, list[int]] = {4: [], 10: []}
    for i in range(8000):
        ids = sampler.sample(Document(30), lengths, example_rng(5, 0, i)).position_ids
        edge = 10 if ids[9] == 9 and ids[-10] == 420 else 4
        assert (ids[:edge] == np.arange(edge)).all()
        assert (ids[-edge:] == np.arange(430 - edge, 430)).all()
        middle = ids[edge:-edge]
        assert (np.diff(middle) == 1).all()
        skips[edge].append(int(middle[0]) - edge)
    assert 0.45 < len(skips[10]) / 8000 < 0.55
    # Independent reference: the density on a fine grid.
    grid = np.linspace(0, 1, 10_001)
    density = np.exp(-0.5 * ((grid - 0.5) / 0.3) ** 2)
    deviation = 401 * np.sqrt((density * (grid - 0.5) ** 2).sum() / density.sum())
    for own in skips.values():
        assert np.mean(own) == pytest.approx(200, abs=8)
        assert np.std(own) == pytest.approx(deviation, rel=0.05)


def published_cream_ends(train: int, target: int, edge: int, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Where the middle ends by the description of the authors' code, drawn half window by half window."""
    factor, middle = target // train, train - 2 * edge
    halves = np.clip(rng.normal(1 + factor, 3.0, draws), 2, 2 * factor).astype(int)
    low = np.floor(edge + (middle - 1) * halves / 2)
    high = halves * train // 2 - edge - 1
    return low + np.floor(rng.random(draws) * (high - low + 1))


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_cream_is_that_of_its_authors(factor: int) -> None:
    """Ours had the mean at 0.5 of the range, an edge of 32 tokens, and text that ran on in long documents."""
    train, draws = 240, 4000
    lengths, sampler = Lengths(train, train, factor * train), CREAM()
    ends: dict[int, list[int]] = {4 * factor: [], train // 3: []}
    for i in range(draws):
        window = sampler.sample(Document(lengths.target), lengths, example_rng(8, 0, i))
        ids = window.position_ids
        edge = train // 3 if (np.diff(ids)[: train // 3 - 1] == 1).all() and ids[-train // 3] == lengths.target - (
            train // 3) else 4 * factor  # fmt: skip
        ends[edge].append(int(ids[-edge - 1]))
        assert (ids[:edge] == np.arange(edge)).all() and (ids[-edge:] == np.arange(-edge, 0) + lengths.target).all()
        assert (window.token_index == ids).all()  # of a document of the target's length
    assert 0.45 < len(ends[train // 3]) / draws < 0.55
    for edge, own in ends.items():
        wanted = published_cream_ends(train, lengths.target, edge, np.random.default_rng(1), 40_000)
        assert np.mean(own) == pytest.approx(wanted.mean(), abs=5 * wanted.std() / len(own) ** 0.5)
        assert np.std(own) == pytest.approx(wanted.std(), rel=0.06)
        if factor == 8:
            first = edge + (train - 2 * edge) - 1
            assert 0.28 < np.mean((np.array(own) - first) / (lengths.target - train)) < 0.45


def test_cream_takes_the_end_of_a_short_document_for_its_tail() -> None:
    lengths = Lengths(240, 240, 1920)
    for i in range(200):
        text = CREAM().sample(Document(600), lengths, example_rng(9, 0, i)).token_index
        edge = 80 if text[-80] == 520 else 32
        assert (text[-edge:] == np.arange(600 - edge, 600)).all() and (np.diff(text[edge:-edge]) == 1).all()


def test_longrecipe_is_that_of_its_authors() -> None:
    """A beginning of U{1, ..., Lw / 2} tokens, and every ordered list of skips alike."""
    lengths, boundaries, draws = Lengths(40, 40, 44), [10, 30], 6000
    first_jump, seen = np.zeros(41), {}
    for i in range(draws):
        skips = LongRecipe().sample(Document(40, boundaries), lengths, example_rng(7, 0, i)).position_ids
        skips = skips - np.arange(40)
        jumps = np.flatnonzero(np.diff(skips)) + 1
        assert set(jumps) <= {*range(10, 21), 30}
        seen[(int(skips[25]), int(skips[39]))] = seen.get((int(skips[25]), int(skips[39])), 0) + 1
        if skips[25]:
            first_jump[jumps[0]] += 1
    # Behind the first sentence: the last two of an ordered list of three numbers of {0, ..., 4}.
    lists = {(b, c): b + 1 for b in range(5) for c in range(b, 5)}
    for pair, count in lists.items():
        share = count / sum(lists.values())
        assert abs(seen.get(pair, 0) / draws - share) < 5 * (share / draws) ** 0.5
    # The beginning ends at 1 to 20 tokens alike: half of the jumps are where the sentence begins, the others later.
    assert first_jump[10] / first_jump.sum() == pytest.approx(0.5, abs=0.05)
    assert np.abs(first_jump[11:21] / first_jump.sum() - 0.05).max() < 0.02


def test_longrecipe_skips_at_sentences_only() -> None:
    lengths, boundaries = Lengths(original=40, train=40, target=400), [0, 7, 19, 33, 60]
    seen: set[int] = set()
    for i in range(300):
        ids = LongRecipe(start="sentence").sample(Document(80, boundaries), lengths, example_rng(6, 0, i)).position_ids
        seen |= set((np.flatnonzero(np.diff(ids) > 1) + 1).tolist())
    assert seen == {7, 19, 33}


def distances_of(policy: tuple[np.ndarray, np.ndarray], train: int, target: int) -> np.ndarray:
    """Share of a window's pairs at each distance, window by window."""
    pairs = np.zeros(target)
    for cut, cut_share in enumerate(policy[0], start=1):
        for skip, skip_share in enumerate(policy[1]):
            ids = np.concatenate([np.arange(cut), np.arange(cut, train) + skip])
            distances = (ids[:, None] - ids[None, :])[np.tril_indices(train, -1)]
            pairs += cut_share * skip_share * np.bincount(distances, minlength=target)
    return pairs / pairs.sum()


@pytest.mark.parametrize("cut", ["matched", "any"])
def test_the_matched_policy_fits_better_than_any_nearby(cut: str) -> None:
    """Nearer to what is left to learn than PoSE's, and no small change of its weights is nearer still."""
    lengths = Lengths(original=8, train=8, target=32)
    distance = np.arange(1, 32)
    wanted = (1 - distance / 32) - np.maximum(0, 1 - distance / 8)
    wanted /= wanted.sum()

    def likelihood(policy: tuple[np.ndarray, np.ndarray]) -> float:
        return float(wanted @ np.log(distances_of(policy, 8, 32)[1:]))

    policy = Matched(cut=cut).policy(lengths)
    found = likelihood(policy)
    uniform = (np.full(7, 1 / 7), np.full(25, 1 / 25))
    assert found > likelihood(uniform) + 0.05
    assert [float(part.sum()) for part in policy] == pytest.approx([1, 1])
    draw = np.random.default_rng(0)
    for _ in range(50):
        cuts = 0.99 * policy[0] + 0.01 * draw.dirichlet(np.ones(7)) if cut == "matched" else policy[0]
        skips = 0.99 * policy[1] + 0.01 * draw.dirichlet(np.ones(25))
        assert likelihood((cuts, skips)) < found + 1e-4
    if cut == "any":
        assert (policy[0] == uniform[0]).all()


def test_matched_draws_from_its_policy() -> None:
    lengths, draws = Lengths(original=6, train=6, target=14), 20_000
    cuts, skips = Matched().policy(lengths)
    seen = Counter(
        tuple(Matched().sample(Document(6), lengths, example_rng(7, 0, i)).position_ids.tolist()) for i in range(draws)
    )
    expected: Counter[tuple[int, ...]] = Counter()
    for cut, cut_share in enumerate(cuts, start=1):
        for skip, share in enumerate(skips):
            expected[(*range(cut), *range(cut + skip, 6 + skip))] += cut_share * share
    assert set(seen) <= set(expected)
    for ids, share in expected.items():
        assert abs(seen[ids] / draws - share) < 5 * (share / draws) ** 0.5 + 1e-4


def test_content_modes() -> None:
    lengths, document = Lengths(original=8, train=8, target=64), Document(num_tokens=200)
    for index in range(50):
        rng = [example_rng(0, 0, index) for _ in range(3)]
        contiguous = PoSE(chunks=3).sample(document, lengths, rng[0])
        aligned = PoSE(chunks=3, content="aligned").sample(document, lengths, rng[1])
        uniform = PoSE(chunks=3, content="uniform").sample(document, lengths, rng[2])
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
        tuple(RandPos().sample(Document(3), lengths, example_rng(3, 0, i)).position_ids.tolist()) for i in range(draws)
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
