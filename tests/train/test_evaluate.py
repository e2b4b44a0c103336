import pytest

from epo_kernels.train.data import Episode
from epo_kernels.train.envs import Task
from epo_kernels.train.evaluate import panel_starts, summarize, wilson


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
    episodes = [
        Episode(task, 0, seed, score=100.0, success=True, official_success=True),
        Episode(task, 1, seed, score=50.0, official_success=True),
        Episode(task, 2, seed, score=0.0, failed=True, finish="the JVM died"),
    ]
    record = summarize(episodes, "before", 0, "iid", "greedy")
    assert (record.episodes, record.failed) == (2, 1)
    assert (record.mean_score, record.success, record.official_success) == (75.0, 0.5, 1.0)
    assert (record.success_low, record.success_high) == wilson(1, 2)
    with pytest.raises(RuntimeError, match="the JVM died"):
        summarize(episodes[2:], "before", 0, "iid", "greedy")
