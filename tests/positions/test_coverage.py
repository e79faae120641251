"""Closed forms against every possible window, and against sampling."""

import itertools
import json
from collections import Counter
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipwise import CREAM, FullLength, Lengths, LongRecipe, Matched, Plain, PoSE, PositionSampler, RandPos, UserError
from skipwise.positions import SAMPLERS
from skipwise.positions.coverage import sample_coverage, windows_to_cover
from tests.commands import skipwise

SMALL = Lengths(original=6, train=6, target=15)
EXACT: list[PositionSampler] = [
    *(PoSE(chunks=chunks) for chunks in (1, 2, 3, 4, 6)),
    PoSE(first_chunk="half"),
    PoSE(skips="sorted"),
    Matched(),
    Matched(cut="any"),
    RandPos(),
    FullLength(),
    Plain(),
]


def every_window(sampler: PositionSampler, lengths: Lengths) -> list[tuple[float, list[int]]]:
    """(probability, position ids) of every window, written down from the paper's words and not from the sampler."""
    train, most = lengths.train, lengths.target - lengths.train
    if isinstance(sampler, FullLength):
        return [(1.0, list(range(lengths.target)))]
    if isinstance(sampler, Plain):
        return [(1.0, list(range(train)))]
    if isinstance(sampler, RandPos):
        samples = list(itertools.combinations(range(lengths.target), train))
        return [(1 / len(samples), list(sample)) for sample in samples]
    if isinstance(sampler, Matched):  # its policy is tested where it is made
        cut_shares, skip_shares = sampler.policy(lengths)
        return [
            (cut_share * skip_share, [*range(cut), *range(cut + skip, train + skip)])
            for cut, cut_share in enumerate(cut_shares, start=1)
            for skip, skip_share in enumerate(skip_shares)
        ]
    assert isinstance(sampler, PoSE)
    cuts = list(itertools.combinations(range(1, train), sampler.chunks - 1))
    if sampler.first_chunk == "half":
        cuts = [cut for cut in cuts if cut[0] <= (train + 1) // 2]
    windows = []
    for cut in cuts:
        for skips in itertools.product(range(most + 1), repeat=sampler.chunks - 1):
            skips = (0, *skips)
            if list(skips) != sorted(skips):
                continue
            probability = 1 / len(cuts) / np.prod([most - skip + 1 for skip in skips[:-1]])
            edges = [0, *cut, train]
            ids = [token + skips[i] for i in range(sampler.chunks) for token in range(edges[i], edges[i + 1])]
            windows.append((float(probability), ids))
    return windows


@pytest.mark.parametrize("sampler", EXACT, ids=str)
def test_formulas_against_every_possible_window(sampler: PositionSampler) -> None:
    pairs, seen = np.zeros(SMALL.target), np.zeros(SMALL.target)
    windows = every_window(sampler, SMALL)
    assert sum(probability for probability, _ in windows) == pytest.approx(1)
    for probability, ids in windows:
        count = Counter(b - a for a, b in itertools.combinations_with_replacement(ids, 2))
        for distance, number in count.items():
            pairs[distance] += probability * number
            seen[distance] += probability
    assert sampler.distances(SMALL).pairs == pytest.approx(pairs, abs=1e-12)
    formula = sampler.distances(SMALL).seen
    if formula is None:
        assert isinstance(sampler, RandPos) or sampler.chunks > 2  # type: ignore[attr-defined]
    else:
        assert formula == pytest.approx(seen, abs=1e-12)


def test_what_has_no_formula_says_so() -> None:
    """Every sampler has one, or is sampled."""
    for sampler in (PoSE(chunks=3, skips="sorted"), CREAM(edge=2), LongRecipe()):
        assert sampler.distances(SMALL).pairs is None and sampler.distances(SMALL).seen is None
        sampled = sample_coverage(sampler, SMALL, windows=100)
        assert sampled.pairs.sum() == pytest.approx(comb(7, 2))
        assert sampled.seen[6:].max() > 0
    assert {type(sampler) for sampler in EXACT} | {CREAM, LongRecipe} == set(SAMPLERS)


@given(st.integers(2, 40), st.integers(0, 200), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_no_pair_is_lost(train: int, most: int, chunks: int) -> None:
    """Whatever is drawn, a window of n tokens has n (n + 1) / 2 pairs, each with itself included."""
    sampler = PoSE(chunks=min(chunks, train))
    pairs = sampler.distances(Lengths(original=train, train=train, target=train + most)).pairs
    assert pairs is not None
    assert pairs.sum() == pytest.approx(comb(train + 1, 2), rel=1e-9)
    assert (pairs >= 0).all()
    assert pairs[0] == pytest.approx(train)


@pytest.mark.parametrize("sampler", EXACT, ids=str)
def test_sampling_agrees_within_its_error(sampler: PositionSampler) -> None:
    lengths = Lengths(original=24, train=24, target=150)
    sampled = sample_coverage(sampler, lengths, windows=3000, seed=1)
    exact = sampler.distances(lengths).pairs
    assert exact is not None
    # Distances that are seen less often than some dozen times have no normal error.
    often = sampled.seen * sampled.windows > 50
    assert often.sum() > 20
    # What is too rare to be drawn has no error either.
    assert (np.abs(exact - sampled.pairs)[often] <= 5 * sampled.pairs_stderr[often] + 5 / sampled.windows).all()
    seen = sampler.distances(lengths).seen
    if seen is not None:
        error = np.sqrt(seen * (1 - seen) / sampled.windows)
        assert (np.abs(seen - sampled.seen) <= 5 * error + 1e-9).all()


def test_later_chunks_lean_to_the_right() -> None:
    """Three chunks drawn one after the other show far distances more often than two; the paper's Figure 5."""
    lengths = Lengths(original=2048, train=2048, target=16384)
    two, three = (PoSE(chunks=chunks).distances(lengths).pairs for chunks in (2, 3))
    assert two is not None and three is not None
    assert three[9000:13000].sum() > 1.2 * two[9000:13000].sum()
    plain = Plain().distances(lengths).seen
    pose = PoSE().distances(lengths).seen
    assert plain is not None and pose is not None
    assert (plain[2048:] == 0).all() and (pose > 0).all()


def test_windows_until_all_is_seen() -> None:
    """By hand, and against how long it really takes."""
    assert windows_to_cover(np.array([1.0, 0.5])) == 7  # 2^-7 is the first below a hundredth
    assert windows_to_cover(np.array([1.0, 0.5, 0.5])) == 8
    assert windows_to_cover(np.array([1.0, 1.0])) == 1
    assert windows_to_cover(np.array([1.0, 0.0])) is None
    lengths = Lengths(original=8, train=8, target=24)
    seen = PoSE().distances(lengths).seen
    assert seen is not None
    bound = windows_to_cover(seen, confidence=0.9)
    assert bound is not None
    covered = [(sample_coverage(PoSE(), lengths, bound, seed=seed).seen > 0).all() for seed in range(200)]
    assert np.mean(covered) > 0.85


def test_at_least_one_window() -> None:
    with pytest.raises(UserError, match="at least one window"):
        sample_coverage(PoSE(), SMALL, windows=0)


def test_the_command() -> None:
    output = skipwise("coverage", "--target", "1k", "--train-length", "64", "--windows", 20)
    assert "relative distances of 1,024" in output.lower()
    assert "never" in output and "~" in output
    flags = ("--target", 300, "--train-length", 64, "--json", "--positions", "{name: pose, chunks: 2}")
    (own,) = json.loads(skipwise("coverage", *flags)).values()
    exact = PoSE().distances(Lengths(original=64, train=64, target=300)).seen
    assert own["seen"] == pytest.approx(exact)
    assert own["seen_exact"] and own["pairs_exact"]
    assert own["windows_to_cover"] == windows_to_cover(np.array(own["seen"]))
    assert "Did you mean 'chunks'" in skipwise(
        "coverage", "--target", 300, "--train-length", 64, "--positions", "{name: pose, chunk: 2}", code=2
    )
