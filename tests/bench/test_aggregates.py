"""Aggregates over seeds, against values computed by hand."""

import pytest

from bench.aggregates import (
    area_under_curve,
    improvement_interval,
    interquartile_mean,
    interquartile_mean_interval,
    performance_profile,
    probability_of_improvement,
)


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    # Ten scores: two are cut at each end, and (2 + 3 + 4 + 5 + 6 + 7) / 6 = 4.5 remains.
    assert interquartile_mean([100, 0, 1, 2, 3, 4, 5, 6, 7, 50]) == pytest.approx(4.5)
    assert interquartile_mean([1, 2, 9]) == pytest.approx(4)  # too few to cut any
    assert interquartile_mean([-90, 1, 2, 80]) == pytest.approx(1.5)


def test_profile_counts_runs_strictly_above():
    assert performance_profile([0.1, 0.5, 0.5, 0.9], [0, 0.1, 0.5, 0.9]).tolist() == [1, 0.75, 0.25, 0]


def test_probability_of_improvement_counts_ties_as_half():
    # Of 2 x 3 pairs: 1 beats 0, ties 1, loses to 3; 2 beats 0 and 1, loses to 3: (1 + 0.5 + 2) / 6.
    assert probability_of_improvement([1, 2], [0, 1, 3]) == pytest.approx(3.5 / 6)
    assert probability_of_improvement([0, 1, 3], [1, 2]) == pytest.approx(2.5 / 6)


def test_area_is_trapezoidal():
    # (0 + 2) / 2 = 1 and (2 + 4) / 2 = 3, whose mean is 2; with a last point of 4: (1 + 3 + 4) / 3.
    assert area_under_curve([0, 2, 4]) == pytest.approx(2)
    assert area_under_curve([0, 2, 4, 4]) == pytest.approx(8 / 3)
    assert area_under_curve([7]) == 7


def test_interval_is_stratified():
    # Each regime's runs are equal, so resampling within a regime changes nothing; across regimes it would.
    assert interquartile_mean_interval({"a": [0.0] * 4, "b": [1.0] * 4}) == (0.5, 0.5, 0.5)
    value, low, high = interquartile_mean_interval({"a": [0.0, 1.0, 2.0, 3.0]})
    assert value == 1.5
    assert 0 <= low < value < high <= 3


def test_improvement_is_averaged_over_regimes():
    # 1 in the first regime, 1/2 in the second, and no spread in either.
    better, level = {"a": [1.0, 1.0], "b": [0.0, 0.0]}, {"a": [0.0], "b": [0.0, 0.0]}
    assert improvement_interval(better, level) == (0.75, 0.75, 0.75)
    value, low, high = improvement_interval({"a": [0.0, 2.0]}, {"a": [1.0, 1.0]})
    assert (value, low, high) == (0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="regimes"):
        improvement_interval(better, {"a": [1.0]})


@pytest.mark.parametrize("statistic", [interquartile_mean, area_under_curve])
def test_scores_are_a_flat_list(statistic):
    for wrong in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="scores"):
            statistic(wrong)
