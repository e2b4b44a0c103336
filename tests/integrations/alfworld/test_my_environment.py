"""The example of a custom environment, with the TextWorld installed by ALFWorld."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from epo_kernels.train.envs import EnvConfig, Task, make_suite

ROOT = Path(__file__).parents[3]
NAME = "examples.my_environment:CoinSuite"
SETTINGS = [
    f"env.name={NAME}",
    "env.options.rooms=2",
    "env.max_turns=4",
    "model.warm_start.demonstrations=2",
    "model.warm_start.epochs=4",
    "rollout.environments=2",
    "rollout.max_prompt_tokens=256",
    "algorithm.groups=2",
    "algorithm.group_size=2",
    "evaluate.panels=[heldout,train]",
    "evaluate.episodes=2",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def suite(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        suite = make_suite(EnvConfig(name=NAME, cache_dir=cache))
        yield suite
        suite.close()


def test_demonstrations_find_the_coin(suite):
    train, held_out = suite.tasks("train"), suite.tasks("heldout")
    assert not set(train) & set(held_out)
    for task in (train[0], held_out[0]):
        shown = suite.demonstrate(task)
        assert (shown.score, shown.actions[-1]) == (100, "take coin")
        assert len(shown.actions) == 3, "two ways and the coin, as env.options.rooms says"
        for seen, action in zip(shown.observations, shown.actions, strict=True):
            assert action in seen.actions
            assert "coin" in seen.goal
            assert "north" not in seen.goal, "the goal doesn't tell the way"


def test_text_that_would_crash_the_engine_costs_a_turn(suite):
    with suite.borrow() as game:
        before = game.reset(Task("coin", 0))
        for text in ("\0", "save", "", "x" * 5000):
            result = game.step(text)
            assert (result.valid, result.done, result.reward) == (False, False, 0)
            assert (result.observation.scene, result.observation.actions) == (before.scene, before.actions)


def test_processes_that_generate_a_game_at_once_agree(suite):
    games = [suite.make() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(lambda game: game.reset(Task("coin", 77)), games)
    assert others == [first, first]
    for game in games:
        game.close()


def test_the_example_trains_evaluates_and_resumes_as_it_says(tmp_path, cache):
    def train(*settings):
        command = [sys.executable, "-m", "epo_kernels.train", "practice", *SETTINGS, *settings]
        command += [f"env.cache_dir={cache}", f"run_dir={tmp_path}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    steps = train("steps=2")
    assert [step["episode/failed"] for step in steps] == [0, 0]
    records = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {record["panel"] for record in records} == {"heldout", "train"}
    assert [step["training/global_step"] for step in train("steps=3", "evaluate.panels=[]")] == [1, 2, 3]
