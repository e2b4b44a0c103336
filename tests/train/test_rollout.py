import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.envs import EnvironmentFailure, Observation, StepResult, Task
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.rollout.engine import Completion
from epo_kernels.train.rollout.rollout import Rollout
from tests.train.conftest import engine_of, prompts_of


class CountingEngine:
    """Forwards requests and counts them."""

    def __init__(self, engine):
        self.engine = engine
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return self.engine.generate(requests)


class OneByOne:
    """A streaming engine: of what is inside it writes the last request alone at each `advance`."""

    def __init__(self, engine):
        self.engine = engine
        self.inside = {}
        self.requests = []

    @contextmanager
    def awake(self):
        yield
        self.inside.clear()

    def submit(self, requests):
        assert not self.inside.keys() & requests.keys()
        self.inside |= requests
        self.requests += requests.values()

    def advance(self):
        assert self.inside, "asked to write nothing"
        number, request = self.inside.popitem()
        return [(number, *self.engine.generate([request]))]


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
        return StepResult(Observation("goal", f"step {self.steps}"), 0.5, done, 40.0, False)

    def close(self):
        pass


class ScriptedSuite:
    name, max_turns = "scripted", 5

    def make(self):
        return Scripted()


class GatedSuite:
    """Of two kinds: in "slow" ones an action takes until the others have had all of theirs."""

    name, max_turns = "gated", 5

    def __init__(self, actions):
        self.left = actions
        self.lock = threading.Lock()
        self.all_others_acted = threading.Event()

    def make(self):
        return Gated(self)


class Gated(Scripted):
    def __init__(self, suite):
        self.suite = suite

    def step(self, action):
        if self.task.name == "slow":
            if not self.suite.all_others_acted.wait(30):
                raise EnvironmentFailure("the others were held up")
        else:
            with self.suite.lock:
                self.suite.left -= 1
                if not self.suite.left:
                    self.suite.all_others_acted.set()
        return super().step(action)


def play_beside_a_slow_one(engine, policy):
    tasks = [Task("slow", 2), *[Task("quick", 4, seed=7)] * 5]
    episodes = episodes_of(tasks)
    with EnvironmentPool(GatedSuite(actions=5 * 4), 3) as pool:
        rollout_of(pool, policy, engine=engine).play(episodes)
    assert [e.finish for e in episodes] == ["done"] * 6
    assert [len(e.turns) for e in episodes] == [2, 4, 4, 4, 4, 4]


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


@pytest.mark.parametrize("kind", [CountingEngine, OneByOne])
def test_turns_outcomes_and_failures(cloned, kind):
    episodes = episodes_of([Task("a", 1), Task("a", 3), Task("a", 9), Task("a", 3, seed=1), Task("a", 2), Task("a", 4)])
    done = []
    with EnvironmentPool(ScriptedSuite(), 2) as pool:
        engine = kind(engine_of(cloned))
        rollout_of(pool, cloned, engine=engine).play(episodes, done.append)
    assert [len(e.turns) for e in episodes] == [1, 3, 5, 2, 2, 4]
    assert [e.finish for e in episodes] == ["done", "done", "max_turns", "it died", "done", "done"]
    assert [e.failed for e in episodes] == [False, False, False, True, False, False]
    assert [e.total_reward for e in episodes[:3]] == [0.5, 1.5, 2.5]
    assert [t.result for t in episodes[1].turns] == ["step 1", "step 2", "step 3"]
    assert [t.observation.text for t in episodes[1].turns] == ["begin", "step 1", "step 2"]
    assert len(engine.requests) == 1 + 3 + 5 + 2 + 2 + 4  # who has finished generates nothing
    assert done[-1] == 6
    assert done == sorted(done)
    assert any(0 < value < 1 for value in done), "an episode under way counts by the share of its turns"


def test_what_the_policy_wrote_is_kept_with_the_reason_that_ended_it(cloned):
    tokenizer = cloned.tokenizer
    look, newline = (tokenizer(text)["input_ids"] for text in ("go on", "\n"))
    act, end = tokenizer.convert_tokens_to_ids("<|act|>"), tokenizer.eos_token_id
    written = [
        Completion([*look, end], [0.0] * (len(look) + 1), "stop"),
        Completion([act, *look], [0.0] * (len(look) + 1), "length"),
        Completion([*look, *newline], [0.0] * (len(look) + 1), "stop"),
        Completion([end], [0.0], "stop"),
    ]

    class Dictated:
        def generate(self, requests):
            return [written.pop(0) for _ in requests]

    (episode,) = episodes_of([Task("a", 4)])
    with EnvironmentPool(ScriptedSuite(), 1) as pool:
        rollout_of(pool, cloned, engine=Dictated()).play([episode])
    assert [(turn.response, turn.finish) for turn in episode.turns] == [
        ("go on", "stop"),
        ("<|act|>go on", "length"),
        ("go on\n", "stop"),
        ("", "stop"),
    ]


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


def test_a_stream_plays_what_cohorts_play(cloned, suite):
    played = []
    for engine in (engine_of(cloned), OneByOne(engine_of(cloned))):
        episodes = episodes_of(suite.tasks("train")[:5])
        with EnvironmentPool(suite, 3) as pool:
            rollout = rollout_of(pool, cloned, engine=engine, max_turns=suite.max_turns)
            rollout.play(episodes)
        assert rollout.seconds["model"] > 0
        played.append([[(t.prompt_ids, t.response_ids, t.action, t.reward) for t in e.turns] for e in episodes])
    assert played[0] == played[1]


def test_a_slow_environment_holds_nobody_up(cloned):
    play_beside_a_slow_one(OneByOne(engine_of(cloned)), cloned)


def test_prefetched_environments_are_used(cloned, suite):
    tasks = [replace(task) for task in suite.tasks("train")[:3]]
    with EnvironmentPool(suite, 3) as pool:
        rollout = rollout_of(pool, cloned, max_turns=suite.max_turns)
        episodes, plain = episodes_of(tasks), episodes_of(tasks)
        rollout.prefetch(episodes)
        rollout.play(episodes)
        rollout.play(plain)
    assert [e.turns for e in episodes] == [e.turns for e in plain]
