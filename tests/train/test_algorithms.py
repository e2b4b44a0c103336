"""Two episodes of one task, by hand: A earns 1 in three turns, the second not understood; B earns 0 in two."""

import pytest
import torch

import epo_kernels as ek
from epo_kernels.train.config import AlgorithmConfig
from epo_kernels.train.data import ENVIRONMENT, Episode, Sample, Turn, samples_of
from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.rl.algorithms import (
    assign_advantages,
    drop_groups_without_spread,
    first_tokens,
    leave_out_truncated,
    value_states,
)

PENALTY = 0.1


def turn(state, prompt, response, reward=0.0, valid=True):
    seen = Observation("goal", state)
    return Turn(seen, prompt, response, [-1.0] * len(response), "act", reward, valid)


@pytest.fixture
def episodes():
    a = [turn("door", [1], [2, 3]), turn("hall", [1, 2, 3, 4], [5], valid=False), turn("vault", [7], [8, 9], 1.0)]
    b = [turn("door", [1], [2]), turn("hall", [1, 2, 4], [6, 6])]
    return [Episode(Task("t", 0), 0, (0, 1, 1, i), turns=turns) for i, turns in enumerate([a, b])]


def assigned(episodes, layout="turn", **settings):
    """{(episode, turn): the advantages of its tokens}."""
    settings = {"invalid_action_penalty": PENALTY, **settings}
    samples = samples_of(episodes, layout)
    for sample in samples:
        prepare(sample)
    metrics = assign_advantages(episodes, samples, AlgorithmConfig(**settings), "k1")
    return by_turn(samples, "advantages"), metrics, samples


def prepare(sample):
    """Old log-probs -1, reference's -3; a critic that says 0.1 for a turn's first token, and 0.2, ... for the next."""
    width = len(sample.turns)
    sample.old_log_probs, sample.ref_log_probs = torch.full((width,), -1.0), torch.full((width,), -3.0)
    sample.values = torch.full((width,), torch.nan)
    place = 0
    for i in range(width):
        place = place + 1 if i and sample.turns[i] == sample.turns[i - 1] else 1
        sample.values[i] = 0.1 * place if sample.turns[i] != ENVIRONMENT else torch.nan


def by_turn(samples, name):
    found = {}
    for sample in samples:
        for number, value in zip(sample.turns, getattr(sample, name).tolist(), strict=True):
            if number != ENVIRONMENT:
                found.setdefault((sample.episode, number), []).append(value)
    return found


LAYOUTS = pytest.mark.parametrize("layout", ["turn", "episode"])


def about(values):
    return {key: pytest.approx(value, abs=1e-5) for key, value in values.items()}


@LAYOUTS
def test_grpo_compares_episodes(episodes, layout):
    # Returns 1 - 0.1 and 0: each is 0.45 from the mean; deviation 0.9 / sqrt 2.
    whole = 0.5**0.5
    found, metrics, _ = assigned(episodes, layout)
    a, b = whole, -whole
    assert found == about({(0, 0): [a, a], (0, 1): [a], (0, 2): [a, a], (1, 0): [b], (1, 1): [b, b]})
    assert (metrics["episode/groups"], metrics["episode/groups_without_variance"]) == (1, 0)
    assert metrics["critic/advantages/mean"] == pytest.approx((5 * a + 3 * b) / 8, abs=1e-5)
    found, *_ = assigned(episodes, layout, normalize_std=False)
    assert found[0, 2] == pytest.approx([0.45, 0.45])
    found, *_ = assigned(episodes, layout, name="rloo")
    assert found[0, 1] + found[1, 0] == pytest.approx([0.9, -0.9])


@LAYOUTS
def test_grpo_over_turns_as_published(episodes, layout):
    # Each turn has the whole return, and its own penalty alone: 1, 0.9, 1, 0, 0. Mean 0.58.
    found, *_ = assigned(episodes, layout, group_over="turns", normalize_std=False)
    wanted = {(0, 0): [0.42] * 2, (0, 1): [0.32], (0, 2): [0.42] * 2, (1, 0): [-0.58], (1, 1): [-0.58] * 2}
    assert found == about(wanted)


@LAYOUTS
def test_gigpo_adds_the_comparison_in_the_same_state(episodes, layout):
    # Rewards to go with gamma 1/2, A: 0 - 0.05 + 0.25 = 0.2, 0.4, 1; B: 0, 0. In the same state: the door (0.2, 0) and
    # the hall (0.4, 0); the vault was seen once.
    found, *_ = assigned(episodes, layout, name="gigpo", gamma=0.5, normalize_std=False, step_weight=2.0)
    wanted = {
        (0, 0): [0.45 + 2 * 0.1] * 2,
        (0, 1): [0.45 + 2 * 0.2],
        (0, 2): [0.45] * 2,
        (1, 0): [-0.45 - 2 * 0.1],
        (1, 1): [-0.45 - 2 * 0.2] * 2,
    }
    assert found == about(wanted)


def test_an_anchor_is_the_environment_s_state(episodes):
    """The state it names, else the scene, else the text: whatever the answers to the actions before were."""

    def anchors(*seen):
        for episode, observation in zip(episodes, seen, strict=True):
            episode.turns[0].observation = observation
        found, *_ = assigned(episodes, name="gigpo", gamma=0.5, normalize_std=False)
        return found[0, 0][0] == pytest.approx(0.45 + 0.1)  # compared at the first turn

    assert anchors(Observation("goal", "An answer.", "a hall"), Observation("goal", "Another.", "a hall"))
    assert not anchors(Observation("goal", "An answer.", "a hall"), Observation("goal", "An answer.", "a vault"))
    assert anchors(Observation("goal", "a", "commands", "at desk 1"), Observation("goal", "b", "others", "at desk 1"))
    assert not anchors(Observation("goal", "a", "same", "at desk 1"), Observation("goal", "a", "same", "at bed 1"))


def test_gigpo_keeps_to_the_group(episodes):
    episodes[1].group = 1  # now nobody is compared with anybody
    found, *_ = assigned(episodes, name="gigpo")
    assert all(value == 0 for values in found.values() for value in values)


@LAYOUTS
def test_ppo_with_a_turn_as_action(episodes, layout):
    # Values 0.1 at each turn's first token; lambda 0: reward + next value - value.
    found, metrics, samples = assigned(episodes, layout, name="ppo", gae="turn", lam=0.0, whiten=False)
    wanted = {(0, 0): [0.0] * 2, (0, 1): [-0.1], (0, 2): [0.9] * 2, (1, 0): [0.0], (1, 1): [-0.1] * 2}
    assert found == about(wanted)
    targets = {(0, 0): [0.1] * 2, (0, 1): [0.0], (0, 2): [1.0] * 2, (1, 0): [0.1], (1, 1): [0.0] * 2}
    assert by_turn(samples, "returns") == about(targets)
    assert metrics["critic/values/mean"] == pytest.approx(0.1)
    assert metrics["critic/returns/mean"] == pytest.approx((0.1 + 0.0 + 1.0 + 0.1 + 0.0) / 5)
    assert metrics["critic/vf_explained_var"] == pytest.approx(0.0, abs=1e-6)


@LAYOUTS
def test_ppo_through_all_tokens_of_the_episode(episodes, layout):
    # A's values 0.1 0.2 | 0.1 | 0.1 0.2, rewards 0 0 | -0.1 | 0 1; lambda 0: reward + next value - value.
    found, *_ = assigned(episodes, layout, name="ppo", gae="token", lam=0.0, whiten=False)
    assert found[0, 0] == pytest.approx([0.1, -0.1])
    assert found[0, 1] == pytest.approx([-0.1 + 0.1 - 0.1])
    assert found[0, 2] == pytest.approx([0.1, 0.8])
    # lambda 1: what comes from there on, minus the value.
    found, *_ = assigned(episodes, layout, name="ppo", gae="token", lam=1.0, whiten=False)
    assert found[0, 0] == pytest.approx([0.9 - 0.1, 0.9 - 0.2])
    assert found[0, 2] == pytest.approx([1 - 0.1, 1 - 0.2])


@LAYOUTS
def test_ppo_as_published_gives_each_turn_the_whole_return(episodes, layout):
    found, _, samples = assigned(episodes, layout, name="ppo", gae="published", whiten=False)
    assert found == about({(0, 0): [0.9, 0.8], (0, 1): [0.8], (0, 2): [0.9, 0.8], (1, 0): [-0.1], (1, 1): [-0.1, -0.2]})
    assert by_turn(samples, "returns")[0, 1] == pytest.approx([0.9])


def test_whitening_goes_over_tokens(episodes):
    found, *_ = assigned(episodes, name="ppo")
    values = torch.tensor([value for values in found.values() for value in values])
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(values.std()) == pytest.approx(1.0, abs=1e-5)


@LAYOUTS
def test_kl_in_the_reward(episodes, layout):
    # k1 = -1 - (-3) = 2 a token, coefficient 0.01: 0.02 a token, 5 tokens of A, 3 of B.
    found, metrics, _ = assigned(episodes, layout, kl_reward_coeff=0.01, normalize_std=False)
    assert found[0, 0][0] == pytest.approx((0.9 - 0.1 - (0 - 0.06)) / 2)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(2.0)
    found, *_ = assigned(episodes, layout, kl_reward_coeff=0.01, name="ppo", gae="token", whiten=False)
    assert found[0, 2] == pytest.approx([1 - 0.04 - 0.1, 1 - 0.02 - 0.2])
    found, *_ = assigned(episodes, layout, kl_reward_coeff=0.01, name="ppo", gae="turn", whiten=False)
    assert found[0, 1] == pytest.approx([-0.1 - 0.02 + 1 - 0.04 - 0.1])


def test_groups_whose_episodes_earned_the_same_are_dropped(episodes):
    twin = [Episode(Task("t", 1), 1, (0, 1, 1, i), turns=[turn("door", [1], [2], 0.5)]) for i in (2, 3)]
    assert drop_groups_without_spread([*episodes, *twin]) == episodes
    assert drop_groups_without_spread(twin) == []
    assert drop_groups_without_spread([]) == []


def test_cut_responses_do_not_count(episodes):
    samples = leave_out_truncated(samples_of(episodes, "episode"), max_response_tokens=2)
    assert [(sample.episode, sample.turns) for sample in samples] == [(0, [-1, -1, -1, 1]), (1, [0, -1, -1, -1])]
    with pytest.raises(RuntimeError, match="max_response_tokens=1"):
        leave_out_truncated(samples_of(episodes, "turn"), max_response_tokens=1)


def test_where_a_value_is_asked_for():
    sample = Sample([1], [2, 3, 4, 5, 6, 7], [0, 0, ENVIRONMENT, 1, 2, 2])
    assert first_tokens(sample.turns).tolist() == [True, False, False, True, True, False]
    assert value_states(sample, "turn").sum() == 3
    assert value_states(sample, "token").tolist() == value_states(sample, "published").tolist() == sample.mask.tolist()


def test_both_layouts_hold_the_same_tokens(episodes):
    whole = samples_of(episodes, "episode")
    # A's third prompt doesn't go on from the second: a window that moved begins another sequence.
    assert [(s.prompt_ids, s.response_ids, s.turns) for s in whole] == [
        ([1], [2, 3, 4, 5], [0, 0, ENVIRONMENT, 1]),
        ([7], [8, 9], [2, 2]),
        ([1], [2, 4, 6, 6], [0, ENVIRONMENT, 1, 1]),
    ]
    assert whole[0].rollout_log_probs.tolist() == [-1, -1, 0, -1]
    assert [s.num_sampled for s in whole] == [3, 2, 3]
    assert [s.response_ids for s in samples_of(episodes, "turn")] == [[2, 3], [5], [8, 9], [2], [6, 6]]


@pytest.mark.parametrize("layout", ["turn", "episode"])
def test_shaped_advantages_follow_the_turns(episodes, layout):
    """The library's function on the same turns, as rows of a padded batch; nothing else of the samples changes."""
    entropies = {(0, 0): 0.3, (0, 1): 0.9, (0, 2): 0.1, (1, 0): 0.5, (1, 1): 0.7}
    plain, _, _ = assigned(episodes, layout)
    rows = list(entropies)
    entropy = torch.tensor([[entropies[row]] for row in rows])
    given = {
        "repo": {"log_probs": torch.full((5, 1), -1.0), "coeff": 0.3},
        "aem": {"coeff": 1.0, "group_ids": torch.zeros(5, dtype=torch.int64)},
        "empg": {"coeff": 2.0, "clarity_weight": 0.4, "episode_ids": torch.tensor([0, 0, 0, 1, 1])},
    }
    for rule, settings in given.items():
        samples = samples_of(episodes, layout)
        for sample in samples:
            prepare(sample)
            own = [entropies.get((sample.episode, number), torch.nan) for number in sample.turns]
            sample.entropy = torch.tensor(own)
        config = AlgorithmConfig(
            invalid_action_penalty=PENALTY,
            shape=rule,
            shape_coeff=None if rule == "aem" else settings["coeff"],
            shape_clarity_weight=settings.get("clarity_weight", 0.05),
        )
        told = assign_advantages(episodes, samples, config, "k1")
        advantages = torch.tensor([plain[row][0] for row in rows])
        expected = ek.shape_advantages(advantages, entropy, torch.ones(5, 1), rule=rule, **settings)
        found = by_turn(samples, "advantages")
        for row, value in zip(rows, expected[:, 0].tolist(), strict=True):
            assert found[row] == pytest.approx([value] * len(plain[row]), abs=1e-6)
        assert told["critic/advantages/max"] == pytest.approx(float(expected.max()), abs=1e-6)


def test_advantages_are_shaped_only_with_entropies(episodes):
    with pytest.raises(ValueError, match="must be scored"):
        assigned(episodes, shape="aem")
