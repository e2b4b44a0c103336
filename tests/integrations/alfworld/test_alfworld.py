"""The real ALFWorld engine, in real processes, on games generated here."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, Observation, make_suite
from epo_kernels.train.envs.alfworld.games import DATA, TASK_NAMES, author_games
from epo_kernels.train.envs.alfworld.suite import ALFWorldOptions
from epo_kernels.train.envs.pool import EnvironmentPool
from tests.train.pools import reset_all, step_all


@pytest.fixture(scope="module")
def suite():
    suite = make_suite(EnvConfig(name="alfworld"))
    yield suite
    suite.close()


@pytest.fixture(scope="module")
def environment(suite):
    environment = suite.make()
    yield environment
    environment.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_panels_hold_all_six_types_in_turn(suite):
    panels = {split: suite.tasks(split) for split in ("train", "iid", "ood")}
    for tasks in panels.values():
        assert [task.name for task in tasks] == list(TASK_NAMES)
    everything = [task for tasks in panels.values() for task in tasks]
    assert len(set(everything)) == 18, "no task is in two panels"


def test_unseen_games_are_in_scenes_of_their_own(data):
    def scenes(panel):
        return {int(folder.name.rsplit("-", 1)[1]) for folder in (data / DATA / panel).iterdir()}

    assert not scenes("valid_unseen") & (scenes("train") | scenes("valid_seen"))
    assert all(scene % 100 <= 6 for scene in scenes("valid_unseen")), "ALFRED's test scenes"


@pytest.mark.parametrize("split", ["train", "iid", "ood"])
def test_plan_and_demonstration_win_every_game(suite, environment, split):
    for task in suite.tasks(split):
        for actions in (environment.actions("plan", task), suite.demonstrate(task).actions):
            assert "look around" not in environment.reset(task).text.split(".")[0]
            results = [environment.step(action) for action in actions]
            assert all(result.valid for result in results)
            assert [result.done for result in results] == [False] * (len(results) - 1) + [True]
            last = results[-1]
            assert (last.success, last.official_success, last.score) == (True, True, 100)
            assert sum(result.reward for result in results) == 1


def test_what_the_policy_sees(suite, environment):
    task = suite.tasks("train")[0]
    start = environment.reset(task)
    assert start.text.startswith("You are in the middle of a room. Looking quickly around you, you see ")
    assert "Welcome" not in start.text
    assert "Your task" not in start.text
    assert start.goal.startswith("Put ")
    assert start.goal.endswith(".")
    assert start.scene.startswith("You have: nothing. You can: go to ")
    assert "help" not in start.scene
    refused = environment.step("fly to the moon")
    assert (refused.valid, refused.observation.text, refused.reward) == (False, "Nothing happens.", 0)
    plain = make_suite(EnvConfig(name="alfworld", options=ALFWorldOptions(admissible_commands=False))).make()
    seen = plain.reset(task)
    assert seen.scene.startswith("You have: nothing. Places: a ")
    assert start.actions == ()
    assert start.scene.endswith(f"You can: {', '.join(seen.actions)}.")
    plain.close()
    taking = next(index for index, action in enumerate(environment.actions("plan", task)) if action.startswith("take"))
    environment.reset(task)
    results = [environment.step(action) for action in environment.actions("plan", task)[: taking + 1]]
    assert results[-1].observation.text.startswith("You pick up the ")
    assert "You have: nothing" not in results[-1].observation.scene


@pytest.mark.parametrize("admissible", [True, False])
def test_gigpo_meets_in_the_same_place_with_the_same_thing_in_hand(suite, admissible):
    environment = make_suite(EnvConfig(name="alfworld", options=ALFWorldOptions(admissible_commands=admissible))).make()
    task = suite.tasks("train")[0]
    start = environment.reset(task).state
    plan = environment.actions("plan", task)
    environment.reset(task)
    assert environment.step("fly to the moon").observation.state == start
    arrived = environment.step(plan[0]).observation
    assert arrived.state != start
    environment.step("fly to the moon")
    assert environment.step(plan[0]).observation.state == arrived.state, "going where one is changes nothing"
    for look in ("inventory", "look", "help", f"examine {plan[0].removeprefix('go to ')}"):
        shown = environment.step(look)
        assert shown.valid
        assert shown.observation.state == arrived.state, "nor does looking at things"
    states = [environment.step(action).observation.state for action in plan[1:-1]]
    assert len({start, arrived.state, *states}) == len(plan), "on a shortest way no state comes twice"
    other = suite.make()
    other.reset(task)
    assert [other.step(action).observation.state for action in plan[:-1]] == [arrived.state, *states]
    other.close()
    environment.close()


@pytest.mark.parametrize(
    "action", [None, "", "\x00\n{}", "\ud800", "x" * 10**6, '"}\n{"call": "rules"}', "GO  TO\tshelf"]
)
def test_no_text_harms_the_engine(suite, environment, action):
    task = suite.tasks("train")[0]
    environment.reset(task)
    result = environment.step(action)
    assert (result.valid, result.done) == (False, False)
    assert environment.step("  LOOK\n").valid


def test_an_episode_is_the_same_each_time(suite, environment):
    task = suite.tasks("ood")[3]
    actions = environment.actions("plan", task)
    other = suite.make()
    assert environment.reset(task) == other.reset(task)
    first = [environment.step(action) for action in actions]
    assert [other.step(action) for action in actions] == first
    other.close()
    environment.reset(task)
    assert [environment.step(action) for action in actions] == first, "a reset leaves nothing behind"
    with pytest.raises(RuntimeError, match="reset"):
        environment.step("look")


def test_authoring_is_determined_by_its_seed(tmp_path):
    counts = {"train": 2, "iid": 1, "ood": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        author_games(tmp_path / name, counts, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 8, "a game and its description each, and nothing unfinished"
    assert a != c
    with pytest.raises(ValueError, match="exists already"):
        author_games(tmp_path / "a", counts, 1)


@pytest.mark.parametrize(("sign", "told"), [(signal.SIGKILL, "ended with code -9"), (signal.SIGSTOP, "within 10 s")])
def test_an_engine_that_dies_or_hangs_is_replaced_and_reported(sign, told):
    suite = make_suite(EnvConfig(name="alfworld", step_timeout=10.0))
    tasks = suite.tasks("train")[:2]
    made = []
    make = suite.make
    suite.make = lambda: made.append(make()) or made[-1]
    with EnvironmentPool(suite, 2, step_timeout=60) as pool:
        reset_all(pool, tasks)
        victim = made[0].process_id
        os.kill(victim, sign)
        results = step_all(pool, {0: "look", 1: "look"})
        failures = [result for result in results.values() if isinstance(result, EnvironmentFailure)]
        assert len(failures) == 1, "its neighbour goes on"
        assert told in str(failures[0])
        assert str(victim) in str(failures[0])
        assert all(isinstance(seen, Observation) for seen in reset_all(pool, tasks))
        assert pool.replaced == 1
        assert all(result.valid for result in step_all(pool, {0: "look", 1: "look"}).values())
    for environment in made:
        assert environment._worker.process.wait(60) == -signal.SIGKILL, "no engine is left behind"


def test_sixteen_side_by_side(suite, environment):
    tasks = [task for split in ("train", "iid", "ood") for task in suite.tasks(split)][:16]
    scripts = [environment.actions("plan", task) for task in tasks]
    won = set()
    with EnvironmentPool(suite, 16, step_timeout=120, start_timeout=300) as pool:
        assert all(isinstance(seen, Observation) for seen in reset_all(pool, tasks))
        for turn in range(max(map(len, scripts))):
            actions = {slot: script[turn] for slot, script in enumerate(scripts) if turn < len(script)}
            won |= {slot for slot, result in step_all(pool, actions).items() if result.success}
    assert won == set(range(16))


def test_an_engine_imports_no_torch_and_ends_with_its_parent(suite, environment):
    environment.reset(suite.tasks("train")[0])
    maps = Path(f"/proc/{environment.process_id}/maps").read_text()
    assert "libdownward" in maps, "the engine runs in this process"
    assert "torch" not in maps
    program = (
        "from epo_kernels.train.envs import EnvConfig, make_suite\n"
        "import os, sys\n"
        "environment = make_suite(EnvConfig(name='alfworld')).make()\n"
        "print(environment.process_id, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    child = int(done.stdout)
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(") ")[1][:1]:
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("the engine outlives its parent")


def test_missing_data_and_wrong_names_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'pick_heat_then_place_in_recep'"):
        make_suite(EnvConfig(name="alfworld", options=ALFWorldOptions(task_names=["pick_heat_then_place"])))
    one = make_suite(EnvConfig(name="alfworld", options=ALFWorldOptions([TASK_NAMES[3]], [TASK_NAMES[1]])))
    assert {task.name for task in one.tasks("train") + one.tasks("iid")} == {TASK_NAMES[3]}
    assert {task.name for task in one.tasks("ood")} == {TASK_NAMES[1]}
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"lacks json_2\.1\.1/train: .*`alfworld-download`"):
        make_suite(EnvConfig(name="alfworld"))


def test_games_that_the_package_leaves_out_are_left_out(data, tmp_path, monkeypatch):
    shutil.copytree(data / DATA, tmp_path / DATA)
    train = tmp_path / DATA / "train"
    first, second, third, *_ = sorted(train.glob("*/*/game.tw-pddl"))
    first.write_text(first.read_text().replace('"solvable": true', '"solvable": false'))
    second.parent.parent.rename(train / second.parent.parent.name.replace("-None-", "Sliced-None-"))
    (third.parent / "traj_data.json").unlink()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert len(make_suite(EnvConfig(name="alfworld")).tasks("train")) == 3
