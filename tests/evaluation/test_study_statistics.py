"""Intervals that hold what they promise."""

import numpy as np
import pytest

from skipwise.evaluation.statistics import Mean, crossed_mean, holm


def test_the_mean_is_a_sum_over_a_sum() -> None:
    sums = np.array([[2.0, 12.0], [4.0, 6.0]])
    assert crossed_mean(sums, np.array([1.0, 3.0])).value == pytest.approx(24 / (2 * 4))


@pytest.mark.parametrize(("seed_spread", "document_spread"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_interval_holds_the_truth_often_enough(seed_spread: float, document_spread: float) -> None:
    """Whatever varies: 95 % of intervals, or more, and they are not empty promises."""
    draw, held, values, variances = np.random.default_rng(0), 0, [], []
    truth, trials, sizes = 0.7, 400, np.array([1.0, 2.0, 1.0, 3.0, 1.5, 2.5, 1.0, 2.0])
    for _ in range(trials):
        seeds = draw.normal(0, seed_spread, (5, 1))
        documents = draw.normal(0, document_spread, (1, 8))
        rates = truth + seeds + documents + draw.normal(0, 0.1, (5, 8))
        mean = crossed_mean(rates * sizes, sizes)
        assert mean.interval is not None and mean.stderr is not None
        held += mean.interval[0] <= truth <= mean.interval[1]
        values.append(mean.value)
        variances.append(mean.stderr**2)
    assert held / trials > 0.93
    # On average the squared error is what the value really varies by, or a little more.
    assert 0.85 < np.mean(variances) / np.var(values) < 1.35


def test_one_seed_or_one_document_tells_of_the_other_only() -> None:
    values = np.array([[1.0, 2.0, 4.0]])
    by_hand = np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    one_seed = crossed_mean(values, np.ones(3))
    assert (one_seed.stderr, one_seed.degrees) == (pytest.approx(by_hand), 2)
    one_document = crossed_mean(values.T, np.ones(1))
    assert (one_document.stderr, one_document.degrees) == (pytest.approx(by_hand), 2)
    alone = crossed_mean(np.ones((1, 1)), np.ones(1))
    assert alone == Mean(1.0, None, 0)
    assert alone.interval is None and alone.p_value is None


def test_p_values() -> None:
    """By the table of the t distribution: 2.776 at 4 degrees and 5 %."""
    assert Mean(2.776, 1.0, 4).p_value == pytest.approx(0.05, abs=1e-4)
    assert Mean(-2.776, 1.0, 4).p_value == pytest.approx(0.05, abs=1e-4)
    low, high = Mean(1.0, 1.0, 4).interval or (0, 0)
    assert (low, high) == pytest.approx((1 - 2.776, 1 + 2.776), abs=1e-3)
    assert Mean(0.0, 0.0, 4).p_value == 1.0
    assert Mean(0.1, 0.0, 4).p_value == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.001, 0.03, 0.5]) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
