"""The pool against environments that raise, hang, die while starting, and answer late."""

import threading
from concurrent.futures import wait

import pytest

from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, Observation, StepResult, Task, make_suite
from epo_kernels.train.envs.pool import EnvironmentPool
from tests.train.pools import reset_all, step_all

GOOD = Task("good", 0)


class Scripted:
    """Does what its action says."""

    def __init__(self, suite):
        self.suite = suite
        self.closed = threading.Event()

    def reset(self, task):
        self.suite.resets.append(task)
        if task.name == "hang":
            self.closed.wait()
        return Observation("goal", f"reset to {task.name} {task.variation}")

    def step(self, action):
        if action in ("raise", "hang"):
            self.suite.broken = self
        if action == "raise":
            raise KeyError("a bug in a game")
        if action == "hang":
            self.closed.wait()
            raise EnvironmentFailure("ended while it hung")
        if action == "meet":
            self.suite.meeting.wait(timeout=10)
        return StepResult(Observation("goal", action), 0.0, False, 0.0, False)

    def close(self):
        self.closed.set()


class ScriptedSuite:
    name, max_turns = "scripted", 5

    def __init__(self):
        self.made, self.resets, self.broken = [], [], None
        self.meeting = threading.Barrier(2)
        self.fail_to_start = 0

    def make(self):
        if self.fail_to_start:
            self.fail_to_start -= 1
            raise EnvironmentFailure("no Java")
        self.made.append(Scripted(self))
        return self.made[-1]


@pytest.fixture
def suite():
    return ScriptedSuite()


def test_environments_are_made_when_first_needed(suite):
    with EnvironmentPool(suite, 3) as pool:
        assert not suite.made
        assert [seen.text for seen in reset_all(pool, [GOOD, Task("good", 1)])] == [
            "reset to good 0",
            "reset to good 1",
        ]
        assert len(suite.made) == 2
        reset_all(pool, [GOOD, GOOD])
        assert len(suite.made) == 2, "an environment is kept from episode to episode"


def test_steps_overlap(suite):
    with EnvironmentPool(suite, 2) as pool:
        reset_all(pool, [GOOD, GOOD])
        results = step_all(pool, {0: "meet", 1: "meet"})  # the barrier breaks unless both are inside at once
        assert [results[slot].observation.text for slot in (0, 1)] == ["meet", "meet"]


def test_one_that_raises_fails_alone_and_is_replaced(suite):
    with EnvironmentPool(suite, 2) as pool:
        reset_all(pool, [GOOD, GOOD])
        results = step_all(pool, {0: "raise", 1: "look"})
        assert isinstance(results[0], EnvironmentFailure)
        assert "KeyError" in str(results[0])
        assert isinstance(results[0].__cause__, KeyError)
        assert results[1].observation.text == "look"
        assert "reset the slot" in str(step_all(pool, {0: "look"})[0])
        assert suite.broken.closed.wait(10)
        assert reset_all(pool, [GOOD])[0].text == "reset to good 0"
        assert (pool.replaced, len(suite.made)) == (1, 3)


def test_one_that_hangs_fails_alone_and_is_replaced(suite):
    with EnvironmentPool(suite, 2, step_timeout=0.2) as pool:
        reset_all(pool, [GOOD, GOOD])
        futures = pool.step(0, "hang"), pool.step(1, "look")
        assert futures[1].result(10).observation.text == "look"
        with pytest.raises(EnvironmentFailure, match=r"within 0\.2 s.*raise env\.step_timeout"):
            futures[0].result(10)
        assert suite.broken.closed.wait(10), "the hung environment is ended"
        assert isinstance(reset_all(pool, [GOOD, GOOD])[0], Observation)
        assert step_all(pool, {0: "look"})[0].observation.text == "look"
        assert pool.replaced == 1


def test_a_hung_reset_and_a_failed_start_are_reported(suite):
    suite.fail_to_start = 1
    with EnvironmentPool(suite, 1, start_timeout=0.2) as pool:
        assert "no Java" in str(reset_all(pool, [GOOD])[0])
        assert "env.start_timeout" in str(reset_all(pool, [Task("hang", 0)])[0])
        assert reset_all(pool, [GOOD])[0].text == "reset to good 0"
        assert pool.replaced == 2


def test_too_many_lost_episodes_in_a_row_are_an_error(suite):
    with EnvironmentPool(suite, 1, max_failures=3) as pool:

        def episode(action):
            pool.reset(0, GOOD).result(10)
            step_all(pool, {0: action})

        for _ in range(3):  # a successful one in between resets the count
            episode("raise")
            episode("raise")
            episode("look")
        for _ in range(3):
            episode("raise")
        with pytest.raises(EnvironmentFailure, match=r"3 consecutive episodes.*env\.max_failures.*a bug in a game"):
            pool.reset(0, GOOD)


def test_a_slow_neighbour_holds_nobody_up(suite):
    with EnvironmentPool(suite, 2) as pool:
        reset_all(pool, [GOOD, GOOD])
        slow, fast = pool.step(0, "meet"), pool.step(1, "look")
        assert fast.result(10).observation.text == "look"
        assert not slow.done()
        suite.meeting.wait(timeout=10)
        assert slow.result(10).observation.text == "meet"


def test_prefetched_resets_are_used_once(suite):
    tasks = [Task("good", 0), Task("good", 1)]
    with EnvironmentPool(suite, 2) as pool:
        pool.prefetch(tasks)
        assert [seen.text for seen in reset_all(pool, tasks)] == ["reset to good 0", "reset to good 1"]
        assert sorted(suite.resets, key=lambda task: task.variation) == tasks
        reset_all(pool, tasks)
        assert len(suite.resets) == 4, "the same task again is a new episode"


def test_a_prefetch_that_is_not_wanted_is_forgotten(suite):
    with EnvironmentPool(suite, 1) as pool:
        pool.prefetch([GOOD])
        assert reset_all(pool, [Task("other", 7)])[0].text == "reset to other 7"
        pool.prefetch([GOOD])
        step_all(pool, {0: "look"})
        reset_all(pool, [GOOD])
        assert suite.resets == [GOOD, Task("other", 7), GOOD, GOOD]


def test_closing_ends_everything_even_while_one_hangs(suite):
    pool = EnvironmentPool(suite, 2)
    reset_all(pool, [GOOD, GOOD])
    hung = pool.step(0, "hang")
    pool.close()
    with pytest.raises(EnvironmentFailure, match="closed"):
        hung.result(10)
    assert all(environment.closed.is_set() for environment in suite.made)
    with pytest.raises(RuntimeError, match="closed"):
        pool.step(1, "look")


def test_a_pool_without_slots_is_refused(suite):
    with pytest.raises(ValueError, match="size must be at least 1 slot, got 0"):
        EnvironmentPool(suite, 0)


def test_practice_in_a_pool_equals_practice_alone():
    suite = make_suite(EnvConfig(name="practice"))
    tasks = suite.tasks("train")[:8]
    scripts = [suite.demonstrate(task) for task in tasks]
    with EnvironmentPool(suite, len(tasks)) as pool:
        assert reset_all(pool, tasks) == [script.observations[0] for script in scripts]
        for turn in range(len(scripts[0].actions)):
            futures = [pool.step(slot, script.actions[turn]) for slot, script in enumerate(scripts)]
            wait(futures, timeout=30)
            results = [future.result() for future in futures]
            if turn + 1 < len(scripts[0].actions):
                assert [r.observation for r in results] == [script.observations[turn + 1] for script in scripts]
        assert all(result.success for result in results)
