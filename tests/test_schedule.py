"""phase_weight against numbers computed by hand."""

import math

import pytest

import epo_kernels as ek

OFFICIAL_HORIZON = 150


@pytest.mark.parametrize(
    ("step", "total", "schedule", "expected"),
    [
        (0, 10, "constant", 1.0),
        (99, 10, "constant", 1.0),
        (0, 125, "paper", 2.0),
        (62, 125, "paper", 1.0497870683678639),  # 1 + e^-3 at ⌊125/2⌋
        (31, 125, "paper", 1.2231301601484298),  # 1 + e^-1.5
        (125, 125, "paper", 1 + math.exp(-3 * 125 / 62)),
        (0, OFFICIAL_HORIZON, "official", 1.0),
        (25, OFFICIAL_HORIZON, "official", 1 - 0.2 * (1 - 0.513417119032592)),  # e^(-2/3)
        (75, OFFICIAL_HORIZON, "official", 0.8270670566473226),  # 1 - 0.2 (1 - e^-2)
        (76, OFFICIAL_HORIZON, "official", 0.7686315513218585),  # 0.8 e^(-3/75)
        (150, OFFICIAL_HORIZON, "official", 0.039829654694291156),  # 0.8 e^-3
    ],
)
def test_hand_worked_numbers(step, total, schedule, expected):
    assert ek.phase_weight(step, total, schedule) == pytest.approx(expected, rel=1e-14)


def test_official_jumps_where_the_published_code_does():
    at_half, after = (ek.phase_weight(step, OFFICIAL_HORIZON, "official") for step in (75, 76))
    assert (round(at_half, 3), round(after, 3)) == (0.827, 0.769)


def test_odd_horizon_splits_at_the_floor():
    assert ek.phase_weight(2, 5, "official") == pytest.approx(1 - 0.2 * (1 - math.exp(-2)))
    assert ek.phase_weight(3, 5, "official") == pytest.approx(0.8 * math.exp(-3 * 1 / 3))
    assert ek.phase_weight(4, 5, "paper") == pytest.approx(1 + math.exp(-3 * 4 / 2))


@pytest.mark.parametrize("schedule", ["constant", "paper", "official"])
def test_one_step_is_no_division_by_zero(schedule):
    values = [ek.phase_weight(step, 1, schedule) for step in range(4)]
    assert all(math.isfinite(value) for value in values)
    assert values[0] == {"constant": 1.0, "paper": 2.0, "official": 1.0}[schedule]
    assert values == sorted(values, reverse=True)


def test_the_default_schedule_is_the_papers():
    assert ek.phase_weight(3, 10) == ek.phase_weight(3, 10, "paper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10), "step must be at least 0, got -1"),
        ((0, 0), "total_steps must be at least 1, got 0"),
        ((0, 10, "cosine"), "schedule must be one of constant, paper, official, got 'cosine'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        ek.phase_weight(*arguments)
