"""Environments in separate processes."""

import os
import signal

import pytest

from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, Observation, ProcessEnvironment, StepResult, Task
from epo_kernels.train.envs.pool import EnvironmentPool
from tests.train.pools import reset_all, step_all

MODULE = """
import sys

from epo_kernels.train.envs import Environment, Observation, StepResult


class Lamp(Environment):
    def __init__(self, colour):
        self.colour = colour

    def reset(self, task):
        return Observation(task.name, self.colour, actions=("on", "off"))

    def step(self, action):
        if action == "break":
            raise ValueError("glass everywhere")
        return StepResult(Observation("light", action), 1.0, True, 100.0, True)

    def modules(self):
        return sorted(sys.modules)
"""


@pytest.fixture
def lamp(tmp_path, monkeypatch):
    (tmp_path / "lamp_of_test_process.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from lamp_of_test_process import Lamp

    return Lamp


@pytest.fixture
def environment(lamp):
    environment = ProcessEnvironment(lamp, EnvConfig(), colour="red")
    yield environment
    environment.close()


def test_records_come_through_whole(environment):
    assert environment.reset(Task("light", 0)) == Observation("light", "red", actions=("on", "off"))
    assert environment.step("on") == StepResult(Observation("light", "on"), 1.0, True, 100.0, True)
    assert environment.process_id != os.getpid()


def test_its_process_does_without_pytorch(environment):
    loaded = environment.call("modules")
    assert "epo_kernels.train.envs.process" in loaded
    assert not {"torch", "transformers", "omegaconf"} & set(loaded)


def test_what_it_raises_and_its_death_are_failures(environment):
    with pytest.raises(EnvironmentFailure, match="a Lamp failed: ValueError: glass everywhere"):
        environment.step("break")
    assert environment.step("on").done, "it goes on"
    os.kill(environment.process_id, signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match=r"a Lamp .* ended with code -9"):
        environment.step("on")


def test_one_that_does_not_start_is_told(lamp):
    with pytest.raises(EnvironmentFailure, match=r"a Lamp failed: TypeError.*'size'"):
        ProcessEnvironment(lamp, EnvConfig(), size=3)


def test_a_pool_replaces_one_that_died(lamp):
    class Lamps:
        def make(self):
            return ProcessEnvironment(lamp, EnvConfig(), colour="red")

    with EnvironmentPool(Lamps(), 1, start_timeout=60) as pool:
        reset_all(pool, [Task("light", 0)])
        os.kill(pool._workers[0]._environment.process_id, signal.SIGKILL)
        assert isinstance(step_all(pool, {0: "on"})[0], EnvironmentFailure)
        assert reset_all(pool, [Task("light", 0)]) == [Observation("light", "red", actions=("on", "off"))]
