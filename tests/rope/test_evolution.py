"""The evolution on losses whose minimum is known."""

import numpy as np
import pytest

from skipwise.rope.search import Factors, evolve_factors

WANTED = (1.0, 1.0, 1.3, 2.5, 5.0, 9.0, 11.0, 11.0)


def distance(factors: Factors) -> float:
    return float(np.abs(np.log(factors) - np.log(WANTED)).mean())


def test_it_finds_what_is_there_to_be_found() -> None:
    start = [(1.0,) * 8, (8.0,) * 8]
    found = list(evolve_factors(start, distance, np.random.default_rng(0), generations=60, population=16, most=16.0))
    assert found[0].loss == pytest.approx(min(map(distance, start)))
    assert found[-1].loss < 0.25 * found[0].loss
    losses = [generation.loss for generation in found]
    assert losses == sorted(losses, reverse=True)
    assert [generation.number for generation in found] == list(range(61))


def test_every_candidate_keeps_to_the_rules_and_is_tried_once() -> None:
    tried: list[Factors] = []

    def watch(factors: Factors) -> float:
        tried.append(factors)
        return distance(factors)

    last = list(evolve_factors([(1.0,) * 8], watch, np.random.default_rng(1), generations=20, population=8, most=10.0))[
        -1
    ]
    assert len(tried) == len(set(tried)) == last.tried > 100
    for factors in tried:
        assert min(factors) >= 1.0 and max(factors) <= 10.0
        assert (np.diff(factors) >= 0).all()


def test_the_same_seed_tries_the_same() -> None:
    """So that a search goes on from known losses."""
    runs = [tried_by(seed) for seed in (2, 2, 3)]
    assert runs[0] == runs[1] != runs[2]


def tried_by(seed: int) -> list[Factors]:
    tried: list[Factors] = []

    def watch(factors: Factors) -> float:
        tried.append(factors)
        return distance(factors)

    list(evolve_factors([(2.0,) * 8], watch, np.random.default_rng(seed), generations=5, population=6, most=16.0))
    return tried
