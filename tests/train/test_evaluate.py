import numpy as np
import pytest

from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import EnvironmentFailure, Observation, Task
from epo_kernels.train.evaluate import compare, paired_interval, panel_starts, summarize, verdict, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # 81 of 263 is the example of Newcombe (1998), 0.2553 to 0.3662.
        (0, 10, 0.0, 0.2775328),
        (5, 10, 0.2365931, 0.7634069),
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065433, 1.0),
        (81, 263, 0.2553, 0.3662),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(trials - successes, trials)
    assert wilson(successes, trials) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_a_panel_has_the_same_draws_at_every_moment():
    tasks = [Task("walk", n) for n in range(3)]
    first, second = (panel_starts(tasks, "iid", ["greedy", "sampled"], seed=5) for _ in range(2))
    assert first == second
    assert [episode.greedy for episode in first] == [True] * 3 + [False] * 3
    assert {e.seed for e in first} & {e.seed for e in panel_starts(tasks, "ood", ["greedy"], seed=5)} == set()


def test_summary_leaves_failed_episodes_out_and_counts_them():
    task = Task("walk", 0)
    seed = (0, 0, 0, 0)
    understood, not_understood = (Turn(Observation("g", "o"), [], [], [], "a", valid=valid) for valid in (True, False))
    episodes = [
        Episode(task, 0, seed, score=100.0, success=True, official_success=True, turns=[understood]),
        Episode(task, 1, seed, score=50.0, official_success=True, turns=[understood, not_understood, not_understood]),
        Episode(task, 2, seed, score=0.0, failed=True, finish="the JVM died"),
    ]
    record = summarize(episodes, "before", 0, "iid", "greedy")
    assert (record.episodes, record.failed) == (2, 1)
    assert (record.mean_score, record.success, record.official_success) == (75.0, 0.5, 1.0)
    assert (record.success_low, record.success_high) == wilson(1, 2)
    assert record.valid_action_ratio == 0.5
    assert record.sentence().endswith("2 episodes of 2.0 turns, 50.0% of actions understood")
    with pytest.raises(EnvironmentFailure, match="the JVM died"):
        summarize(episodes[2:], "before", 0, "iid", "greedy")


def record(when, successes, scores=None, decoding="sampled"):
    task = Task("walk", 0)
    scores = scores or [100.0 * bool(success) for success in successes]
    episodes = [
        Episode(task, 0, (0, 0, 0, n), success=bool(s), score=scores[n], failed=s is None)
        for n, s in enumerate(successes)
    ]
    return summarize(episodes, when, 0 if when == "before" else 9, "iid", decoding)


def test_before_and_after_are_compared_task_by_task():
    before = record("before", [False, False, None, True, False, True])
    after = record("after", [True, False, True, True, None, True, False, False])  # a longer panel
    (comparison,) = compare([before, record("step 3", [True] * 6), after, record("before", [True], decoding="greedy")])
    assert (comparison.panel, comparison.decoding, comparison.episodes) == ("iid", "sampled", 4)
    assert comparison.success == paired_interval([0, 0, 1, 1], [1, 0, 1, 1])
    assert comparison.score == paired_interval([0, 0, 100, 100], [100, 0, 100, 100])
    assert "success +25.0 points, paired 95 % interval +0.0 to +75.0 over 4 episodes: the interval includes 0" in (
        comparison.sentence()
    )


def test_a_verdict_names_the_direction():
    assert verdict((0.2, 0.1, 0.3)) == "a rise"
    assert verdict((-0.2, -0.3, -0.1)) == "a fall"
    assert verdict((0.1, 0.0, 0.2)) == verdict((0.1, -0.1, 0.3)) == "the interval includes 0, so no change is shown"


def test_the_paired_interval_of_a_case_worked_by_hand():
    # Differences 0, 1: a resample of two has mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    before, after = [1.0, 0.0], [1.0, 1.0]
    assert paired_interval(before, after, confidence=0.4) == (0.5, 0.5, 0.5)  # the quantiles 0.3 and 0.7
    assert paired_interval(before, after, confidence=0.6) == (0.5, 0.0, 1.0)  # 0.2 and 0.8
    assert paired_interval(after, before, confidence=0.6) == (-0.5, -1.0, 0.0)


def test_the_paired_interval_knows_what_pairs_share():
    rng = np.random.default_rng(0)
    tasks = rng.normal(0, 50, 200)  # their difficulty dwarfs the gain
    gain = rng.normal(1, 1, 200)
    mean, low, high = paired_interval(tasks, tasks + gain)
    spread = gain.std() / np.sqrt(200)
    assert mean == pytest.approx(gain.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.02)
    assert paired_interval(tasks, tasks + gain) == (mean, low, high), "seeded"
    assert paired_interval(tasks, tasks + gain, seed=1) != (mean, low, high)
    assert paired_interval([0, 0], [1, 1]) == (1.0, 1.0, 1.0)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(400):  # success before with 0.4, after with 0.6, on the same 64 tasks
        first, second = rng.random(64) < 0.4, rng.random(64) < 0.6
        _, low, high = paired_interval(first, second, resamples=400, seed=trial)
        hits += low <= 0.2 <= high
    assert 0.91 <= hits / 400 <= 0.98  # 0.95 within what 400 trials and 64 tasks allow


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], []), "one value per task"),
        (([1.0], [1.0, 2.0]), "one value per task"),
        (([float("nan")], [1.0]), "must be finite"),
        (([0.0], [1.0], 1.0), "confidence must be"),
    ],
)
def test_wrong_pairs_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        paired_interval(*arguments)
