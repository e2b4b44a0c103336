"""The walk to the vault: its exact rules, its expert, and that no shortcut wins."""

import random

import pytest

from epo_kernels.train.envs import EnvConfig, Task, make_suite, practice
from epo_kernels.train.envs.practice import (
    ACTIONS,
    IID_VARIATIONS,
    TRAIN_VARIATIONS,
    PracticeEnvironment,
    PracticeOptions,
    Room,
    rooms,
)
from epo_kernels.train.setting import ConfigError

SMALL = PracticeOptions(length=3, spare_turns=2)
HAND_MADE = [
    Room("sun", night=False),  # left
    Room("sun", night=True, glint="silver", glint_way="ahead"),  # right
    Room("tree", night=True, glint="gold", glint_way="left"),  # ahead, by night as by day
]


def make(**settings):
    return make_suite(EnvConfig(name="practice", options=PracticeOptions(**settings)))


def play(monkeypatch, actions):
    monkeypatch.setattr(practice, "rooms", lambda task, config: HAND_MADE)
    environment = PracticeEnvironment(SMALL)
    environment.reset(Task("walk", 0))
    return [environment.step(action) for action in actions]


def test_hand_worked_win(monkeypatch):
    results = play(monkeypatch, ["go left", "go right", " GO  Ahead "])
    assert [r.reward for r in results] == [0, 0, 1]
    assert [r.done for r in results] == [False, False, True]
    assert [r.score for r in results] == [pytest.approx(100 / 3), pytest.approx(200 / 3), 100]
    assert [r.success for r in results] == [False, False, True]
    assert [r.observation.text for r in results] == ["You walk on.", "You walk on.", "The vault opens."]
    assert results[0].observation.scene == "Sign: sun, by night. Silver glints ahead."
    assert results[1].observation.scene == "Sign: tree, by night. Gold glints left."
    assert results[0].observation.goal == "Follow the signs through 3 rooms to the vault."
    assert [r.official_success for r in results] == [False, False, True]


def test_hand_worked_silver_spoils(monkeypatch):
    results = play(monkeypatch, ["go left", "go ahead", "go ahead", "go right", "go ahead"])
    assert [r.reward for r in results] == [0, 0.03, 0, 0, 0]
    assert results[2].observation.text == "Nothing is left there, you come back."
    assert results[-1].observation.text == "The vault stays shut."
    assert (results[-1].done, results[-1].success, results[-1].score) == (True, False, 99)
    assert results[-1].official_success, "the published figure counts what is no success"


def test_hand_worked_gold_ends(monkeypatch):
    results = play(monkeypatch, ["go left", "go right", "go left"])
    assert [r.reward for r in results] == [0, 0, 0.1]
    assert (results[-1].done, results[-1].success, results[-1].score) == (True, False, pytest.approx(200 / 3))


def test_hand_worked_time_is_up(monkeypatch):
    results = play(monkeypatch, ["go right", "open sesame", "go left", "go left", "go right"])
    assert [r.valid for r in results] == [True, False, True, True, True]
    assert results[0].observation.text == "A dead end, you come back."
    assert results[1].observation.text == "That is no way."
    assert (results[-1].done, results[-1].success) == (True, False)
    assert results[-1].observation.text == "You walk on. Time is up."
    assert results[-1].score == pytest.approx(200 / 3)


def test_a_step_after_the_end_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="reset"):
        play(monkeypatch, ["go left", "go right", "go ahead", "go ahead"])


@pytest.mark.parametrize("split", ["train", "iid", "ood"])
def test_the_expert_always_wins(split):
    suite = make()
    for task in suite.tasks(split):
        demonstration = suite.demonstrate(task)
        assert demonstration.score == 100
        assert len(demonstration.actions) == len(demonstration.observations) == (48 if split == "ood" else 32)
        assert len(demonstration.actions) <= suite.max_turns
        assert set(demonstration.actions) <= set(ACTIONS)


def test_the_novice_knows_the_day_and_guesses_by_night():
    suite, night = make(length=8, spare_turns=3, demonstrator="novice"), []
    demonstrations = [suite.demonstrate(task) for task in suite.tasks("train")]
    for demonstration in demonstrations:
        walk, passed = rooms(demonstration.task, suite.config.options), 0
        for action in demonstration.actions:
            room, is_right = walk[passed], action == f"go {walk[passed].way}"
            if room.night:
                night.append(is_right)
            else:
                assert is_right
            passed += is_right
    assert sum(night) / len(night) == pytest.approx(1 / 3, abs=0.03)
    assert 0.3 < sum(one.score == 100 for one in demonstrations) / len(demonstrations) < 0.5
    assert suite.demonstrate(demonstrations[0].task) == demonstrations[0]


def test_no_short_cut_ever_wins():
    suite = make()
    environment = suite.make()
    for task in suite.tasks("train")[:200] + suite.tasks("ood")[:200]:
        walk = rooms(task, PracticeOptions())
        for chosen in [i for i, room in enumerate(walk) if room.glint][:3]:
            ways = [room.way for room in walk]
            ways.insert(chosen, walk[chosen].glint_way)  # the expert, but for one short cut
            environment.reset(task)
            total, result = 0.0, None
            for way in ways:
                result = environment.step(f"go {way}")
                total += result.reward
                if result.done:
                    break
            assert result.done
            assert not result.success
            assert total == {"gold": 0.1, "silver": 0.03}[walk[chosen].glint]


def test_the_habit_of_following_glints_is_paid_at_once_and_never_wins():
    suite = make()
    environment = suite.make()
    returns = []
    for task in suite.tasks("train")[:100]:
        environment.reset(task)
        total, result = 0.0, None
        for room in rooms(task, PracticeOptions()):
            for way in filter(None, (room.glint_way, room.way)):
                if result is None or not result.done:
                    result = environment.step(f"go {way}")
                    total += result.reward
        assert not result.success
        returns.append(total)
    assert 0.1 < sum(returns) / len(returns) < 0.2


def test_the_same_task_is_the_same_episode_and_another_is_another():
    def transcript(task):
        environment, generator = PracticeEnvironment(PracticeOptions()), random.Random(0)
        seen = [environment.reset(task)]
        for _ in range(1000):
            seen.append(environment.step(generator.choice(ACTIONS)))
            if seen[-1].done:
                return seen
        pytest.fail("the episode never ends")

    assert transcript(Task("walk", 3)) == transcript(Task("walk", 3))
    assert transcript(Task("walk", 3)) != transcript(Task("walk", 4))
    assert transcript(Task("walk", 3)) != transcript(Task("walk", 3, seed=1))
    # Frozen: an episode that changes with a release makes old results incomparable.
    assert [room.sign for room in rooms(Task("walk", 0), PracticeOptions())[:5]] == [
        "sun",
        "tree",
        "bell",
        "fish",
        "sun",
    ]


def test_splits_are_disjoint_and_hold_the_reward_back_for_32_turns():
    suite = make()
    train, iid, ood = (set(suite.tasks(split)) for split in ("train", "iid", "ood"))
    assert not train & iid
    assert not (train | iid) & ood
    assert len(train) == len(TRAIN_VARIATIONS)
    assert len(iid) == len(IID_VARIATIONS)
    walks = [tuple(rooms(task, PracticeOptions())) for task in suite.tasks("train") + suite.tasks("iid")]
    assert len(set(walks)) == len(walks)
    assert min(map(len, walks)) == 32


def test_difficulty_is_set_by_the_configuration():
    assert {room.glint for room in rooms(Task("walk", 0), PracticeOptions(temptation=0))} == {None}
    assert all(room.glint for room in rooms(Task("walk", 0), PracticeOptions(temptation=1)))
    assert {room.sign for room in rooms(Task("walk", 0), PracticeOptions(signs=2, length=64))} == {"sun", "tree"}
    assert make(length=40, spare_turns=0).max_turns == 60  # the long walk is half as long again
    assert make_suite(EnvConfig(name="practice", max_turns=7)).max_turns == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_names": ["run"]}, "env.options.task_names must be one of walk, long-walk, got 'run'"),
        ({"task_names": []}, "env.options.task_names must name at least one"),
        ({"ood_task_names": []}, "env.options.ood_task_names must name at least one"),
        ({"task_names": ["long-walk"]}, "held out"),
        ({"length": 0}, "env.options.length must be at least 1, got 0"),
        ({"signs": 13}, "env.options.signs must be 1 to 12, got 13"),
        ({"temptation": 1.5}, "env.options.temptation"),
        ({"demonstrator": "nobody"}, "one of expert, novice, got 'nobody'"),
    ],
)
def test_wrong_options_are_refused_readably(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, iid, ood, not 'test'"):
        make().tasks("test")
