import math
from contextlib import nullcontext
from itertools import pairwise

import pytest

from epo_kernels.train.config import load_config
from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.rl.collect import Collector

TASKS = [Task("t", variation) for variation in range(40)]


class Scripted:
    """A rollout in which what a task's episodes earn depends on the task: an even one always 1; an odd one 0 and 1."""

    def __init__(self, lost=lambda task: False):
        self.seconds = {"model": 0.5}
        self.lost = lost
        self.played = []

    def play(self, episodes, report):
        self.played += episodes
        for index, episode in enumerate(episodes):
            won = episode.task.variation % 2 == 0 or index % 2
            episode.failed = self.lost(episode.task)
            episode.turns = [Turn(Observation("g", "o"), [1], [2], [0.0], "a", reward=float(won))]


def collect(rollout, **settings):
    given = {"groups": 6, "group_size": 2, "refills": 0, **settings}
    config = load_config("practice", [f"algorithm.{name}={value}" for name, value in given.items()])
    bars = []

    def bar(total):
        bars.append(total)
        return nullcontext(lambda done: None)

    return Collector(TASKS, rollout, config).collect(3, bar), bars


def test_without_refills_everything_stays():
    collected, bars = collect(Scripted())
    assert collected.kept == collected.episodes == collected.played
    assert (len(collected.kept), bars) == (12, [12])
    assert collected.metrics() == {"episode/draws": 1, "episode/groups_dropped": 0}


def test_zero_variance_groups_are_resampled_until_there_are_enough():
    rollout = Scripted()
    collected, bars = collect(rollout, refills=20)
    assert len(collected.kept) == 12
    assert all(episode.task.variation % 2 for episode in collected.kept)
    assert len({episode.group for episode in collected.episodes}) == len(collected.episodes) / 2 == sum(bars) / 2
    assert len({episode.seed for episode in collected.episodes}) == len(collected.episodes)  # other draws every time
    dropped = {e.group for e in collected.episodes if e.task.variation % 2 == 0}
    assert collected.metrics() == {"episode/draws": len(bars), "episode/groups_dropped": len(dropped)}
    assert dropped
    assert bars[0] == 12
    assert all(1 <= later <= earlier for earlier, later in pairwise(bars))
    assert collected.seconds == {"model": pytest.approx(0.5 * len(bars))}
    assert collect(Scripted(), refills=20)[0].kept == collected.kept  # the same seed draws the same


def test_the_number_of_refills_is_a_limit():
    collected, bars = collect(Scripted(), refills=1, groups=20)
    assert len(bars) == 2
    assert 0 < len(collected.kept) < 40


def test_where_nothing_has_spread_what_there_is_must_do():
    class Flat(Scripted):
        def play(self, episodes, report):
            super().play(episodes, report)
            for episode in episodes:
                episode.turns[0].reward = 1.0

    collected, bars = collect(Flat(), refills=2)
    assert len(bars) == 3
    assert collected.kept == collected.played
    assert len(collected.kept) == 36


def test_lost_episodes_are_excluded_and_resampled_if_all_are_lost():
    collected, bars = collect(Scripted(lost=lambda task: task.variation % 3 == 0))
    assert len(bars) == 1
    assert all(e.task.variation % 3 for e in collected.kept)
    assert len(collected.episodes) == 12
    rollout = Scripted(lost=lambda task: len(rollout.played) <= 24)
    collected, bars = collect(rollout)
    assert bars == [12, 12, 12]
    assert math.isclose(collected.metrics()["episode/draws"], 3)
    assert len(collected.played) == 12


def test_a_step_draws_the_same_tasks_again_and_another_step_others():
    config = load_config("practice", ["algorithm.groups=8"])
    collector = Collector(TASKS, Scripted(), config)
    assert collector.draw(4) == collector.draw(4)
    assert [e.task for e in collector.draw(4)] != [e.task for e in collector.draw(5)]
    assert len({e.task for e in collector.draw(4)}) == 8
