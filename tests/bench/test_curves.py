"""Learning curves and what is computed from them, against values computed by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from bench import band, band_page, curves
from bench.experiments import Outcome


def lines(count=9):
    return [
        {
            "episode/success_rate": step / 10,
            "actor/entropy": 0.5 if step % 2 else 0.3,
            "epo/entropy_by_turn": [0.2, 0.4, None][: 2 + step % 2],
        }
        for step in range(count)
    ]


def test_curve_of_the_metrics(tmp_path):
    curve = curves.curve_of("gate", 3, lines())
    assert curve.success == [step / 10 for step in range(9)]
    assert curve.turn_variance == pytest.approx([0.01] * 9)  # of 0.2 and 0.4
    assert curve.entropy_by_turn == [[0.2, 0.4]] * 3  # steps 1, 5 and 9
    between_steps, between_turns = curves.late_variances(curve)
    # The second half: 0.3, 0.5, 0.3, 0.5, 0.3, with mean 0.38 and squares (3 * 0.0064 + 2 * 0.0144) / 5.
    assert between_steps == pytest.approx(0.0096)
    assert between_turns == pytest.approx(0.01)
    path = tmp_path / "curves.json"
    assert curves.read_curves(path) == []
    path.write_text(json.dumps([asdict(curve)]))
    assert curves.read_curves(path) == [curve]


@pytest.mark.parametrize(
    ("success", "collapsed", "recovered"),
    [
        ([0.2] * 5 + [0.8] * 10, False, False),
        ([0.8] * 5 + [0.5] * 10, False, False),
        ([0.8] * 5 + [0.0] * 10, True, False),
        ([0.8] * 5 + [0.0] * 10 + [0.7] * 5, True, True),
        ([0.8] * 5 + [0.0] * 10 + [0.6] * 5, True, False),  # 0.6 is less than 80 % of 0.8
        ([0.04] * 5 + [0.0] * 10, False, False),  # too little to lose
        ([0.8, 0.0, 0.8, 0.8, 0.8, 0.8, 0.8], False, False),  # one bad step
    ],
)
def test_collapse_and_recovery(success, collapsed, recovered):
    assert curves.has_collapsed(success) == collapsed
    assert curves.has_recovered(success) == recovered


def test_a_collapse_ends_in_a_habit_or_in_noise():
    assert curves.ends_in_noise([0.2] * 5 + [5.0] * 5)
    assert not curves.ends_in_noise([0.2] * 5 + [0.01] * 5)


def test_mean_by_turn_leaves_out_turns_nobody_played():
    first = curves.Curve("gate", 0, [0.0], [0.2], [0.0], [[0.2, 0.4]])
    second = curves.Curve("gate", 1, [0.0], [0.2], [0.0], [[0.6, None, None]])
    means = band_page.mean_by_turn([first, second])
    assert means[0, :2] == pytest.approx([0.4, 0.4])
    assert np.isnan(means[0, 2])


def series():
    """Two arms, ten seeds: without a term half of the episodes succeed, with the gate all do."""
    outcomes, found = [], []
    for arm, successes in ((band.NO_TERM, [True, False]), ("gate", [True, True])):
        for seed in band.SEEDS:
            outcomes += [
                Outcome(arm, seed, when, 2, successes, [100.0, 0.0], 90.0, 1.0, [], "2026-11-25", "abc1234", "x86_64")
                for when in ("before", "after")
            ]
            found.append(curves.curve_of(arm, seed, lines()))
    return outcomes, found


def test_section_has_a_row_an_arm():
    text = band_page.band_section("band_stable", band.ARMS, *series())
    # The area of 0, 0.1, ... 0.8 is 0.4.
    assert f"| {band.NO_TERM} | 10 | 50.0 (50.0 to 50.0) |  |  | 40.0 (40.0 to 40.0) | 0 | 0 | 0 | 0 |" in text
    assert (
        "| gate | 10 | 100.0 (100.0 to 100.0) | 1.00 (1.00 to 1.00) | +50.0 (+50.0 to +50.0) | 40.0 (40.0 to 40.0) |"
        in text
    )
    assert "70 runs are missing" in text  # seven arms of ten seeds


def test_answer_names_the_arms_that_differ():
    outcomes, _ = series()
    answer = "compared with training without an entropy term, success ended"
    assert band_page.band_answer(outcomes) == f"{answer} higher with gate, P = 1.00 (1.00 to 1.00) (10 seeds)."
    plain = [outcome for outcome in outcomes if outcome.arm == band.NO_TERM]
    assert "are missing" in band_page.band_answer([outcome for outcome in outcomes if outcome.arm == "gate"])
    same = plain + [replace(outcome, arm="gate") for outcome in plain]
    assert band_page.band_answer(same) == f"{answer} neither higher nor lower with any entropy term (10 seeds)."


def test_the_verdict_needs_both_regimes_and_names_what_helped():
    outcomes, _ = series()
    assert band_page.band_verdict({"band_stable": outcomes}) == ""
    text = band_page.band_verdict({"band_stable": outcomes, "band_collapse": outcomes})
    assert "In some settings:** stable regime: gate, P = 1.00 (1.00 to 1.00). collapse regime: gate, P = 1.00" in text
    plain = [outcome for outcome in outcomes if outcome.arm == band.NO_TERM]
    text = band_page.band_verdict({"band_stable": plain, "band_collapse": plain})
    assert text.startswith(
        "**Does the entropy band help at 30 turns? Not measurably:** over 10 seeds in each regime, no"
    )
    half = [replace(outcome, successes=[False, False]) for outcome in plain]
    text = band_page.band_verdict({"band_stable": plain, "band_collapse": half})
    assert "success ends +50.0 (+50.0 to +50.0) points higher" in text
    assert band_page.band_verdict({"band_stable": plain, "band_collapse": half[:-2]}) == "", "a seed is missing"


def test_plot_is_a_picture(tmp_path):
    outcomes, found = series()
    band_page.plot_band(found, band_page.scores_of(outcomes), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
