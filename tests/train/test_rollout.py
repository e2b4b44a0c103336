from dataclasses import replace

import pytest

from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.envs import EnvironmentFailure, Observation, StepResult, Task
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.rollout import Rollout
from tests.train.conftest import engine_of, prompts_of


class CountingEngine:
    """Passes on, and counts what it was asked."""

    def __init__(self, engine):
        self.engine = engine
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return self.engine.generate(requests)


class Scripted:
    """Ends after `variation` steps; dies at its second step where the seed is 1."""

    def reset(self, task):
        self.task, self.steps = task, 0
        return Observation("goal", "begin")

    def step(self, action):
        self.steps += 1
        if self.task.seed == 1 and self.steps == 2:
            raise EnvironmentFailure("it died")
        done = self.steps == self.task.variation
        return StepResult(Observation("goal", f"step {self.steps}"), 0.5, done, 40.0, False, done, True)

    def close(self):
        pass


class ScriptedSuite:
    name, max_turns = "scripted", 5

    def make(self):
        return Scripted()


def rollout_of(pool, policy, cohorts=2, engine=None, max_turns=5):
    return Rollout(
        pool,
        policy,
        engine or engine_of(policy),
        prompts_of(policy),
        max_turns=max_turns,
        cohorts=cohorts,
        response_format="plain",
    )


def episodes_of(tasks):
    return [Episode(task, i, (0, Draw.EPISODE, 1, i)) for i, task in enumerate(tasks)]


def test_turns_outcomes_and_failures(cloned):
    episodes = episodes_of([Task("a", 1), Task("a", 3), Task("a", 9), Task("a", 3, seed=1), Task("a", 2), Task("a", 4)])
    done = []
    with EnvironmentPool(ScriptedSuite(), 2) as pool:
        engine = CountingEngine(engine_of(cloned))
        rollout_of(pool, cloned, engine=engine).play(episodes, done.append)
    assert [len(e.turns) for e in episodes] == [1, 3, 5, 2, 2, 4]
    assert [e.finish for e in episodes] == ["done", "done", "max_turns", "it died", "done", "done"]
    assert [e.failed for e in episodes] == [False, False, False, True, False, False]
    assert [e.total_reward for e in episodes[:3]] == [0.5, 1.5, 2.5]
    assert [t.result for t in episodes[1].turns] == ["step 1", "step 2", "step 3"]
    assert [t.observation.text for t in episodes[1].turns] == ["begin", "step 1", "step 2"]
    assert len(engine.requests) == 1 + 3 + 5 + 2 + 2 + 4  # who has finished generates nothing
    assert done[-1] == 6


@pytest.mark.parametrize(("size", "cohorts"), [(1, 1), (3, 2), (8, 3)])
def test_episodes_do_not_depend_on_their_company(cloned, suite, size, cohorts):
    tasks = suite.tasks("train")[:5]
    played = []
    for slots, groups in [(5, 1), (size, cohorts)]:
        episodes = episodes_of(tasks)
        with EnvironmentPool(suite, slots) as pool:
            rollout_of(pool, cloned, groups, max_turns=suite.max_turns).play(episodes)
        played.append([[(t.prompt_ids, t.response_ids, t.action, t.reward) for t in e.turns] for e in episodes])
    assert played[0] == played[1]


def test_prefetched_environments_are_used(cloned, suite):
    tasks = [replace(task) for task in suite.tasks("train")[:3]]
    with EnvironmentPool(suite, 3) as pool:
        rollout = rollout_of(pool, cloned, max_turns=suite.max_turns)
        episodes, plain = episodes_of(tasks), episodes_of(tasks)
        rollout.prefetch(episodes)
        rollout.play(episodes)
        rollout.play(plain)
    assert [e.turns for e in episodes] == [e.turns for e in plain]
