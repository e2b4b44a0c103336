"""One sample per episode: growing prompts, and their training compared with one sample per turn."""

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from epo_kernels.train.config import ConfigError, load_config
from epo_kernels.train.data import ENVIRONMENT, Turn, samples_of
from epo_kernels.train.envs import Observation
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.io.stopwatch import Stopwatch
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rl.warm_start import cloning_samples, demonstrate
from epo_kernels.train.rollout.dialogue import DialogueBuilder
from epo_kernels.train.rollout.rollout import Rollout
from tests.train.conftest import SMALL, engine_of, prompts_of
from tests.train.test_learner import history_of
from tests.train.test_rollout import episodes_of


def dialogue_of(policy, max_tokens=400):
    return DialogueBuilder(prompts_of(policy, max_tokens=max_tokens), policy.chat, max_tokens)


def play(policy, suite, prompts, count=5):
    episodes = episodes_of(suite.tasks("train")[:count])
    with EnvironmentPool(suite, 3) as pool:
        settings = {"max_turns": suite.max_turns, "cohorts": 2, "response_format": "plain"}
        Rollout(pool, policy, engine_of(policy), prompts, **settings).play(episodes)
    for episode in episodes:  # a policy that wins always has nothing to be told
        episode.score = float(episode.group)
    return episodes


@pytest.fixture(scope="module")
def played(cloned, suite):
    return play(cloned, suite, dialogue_of(cloned))


def test_a_dialogue_holds_the_sampled_ids_and_reads_as_one(cloned, played):
    (sample,) = samples_of(played[:1], "episode")
    turns = played[0].turns
    assert len(turns) > 2
    assert [i for i, turn in zip(sample.response_ids, sample.turns, strict=True) if turn != ENVIRONMENT] == [
        i for turn in turns for i in turn.response_ids
    ]
    text = cloned.tokenizer.decode(sample.prompt_ids + sample.response_ids)
    assert text.startswith("<|user|>")
    assert text.count("<|user|>") == text.count("<|act|>") == len(turns)
    for turn in turns[1:]:
        assert f"<|user|>{turn.observation.text}" in text
    assert "<|endoftext|><|endoftext|>" not in text


@pytest.mark.parametrize("ended", [True, False])
def test_a_response_is_closed_once(cloned, ended):
    end = cloned.tokenizer.eos_token_id
    past = [Turn(Observation("g", "o"), [5, 6], [7, end] if ended else [7, 8], [0.0, 0.0], "act")]
    (ids,) = dialogue_of(cloned).encode([(Observation("g", "answer"), past)])
    wanted = cloned.tokenizer("<|user|>answer<|act|>", add_special_tokens=False)["input_ids"]
    assert ids == ([5, 6, 7, end] if ended else [5, 6, 7, 8, end]) + wanted


def test_a_dialogue_beyond_the_limit_restarts_with_the_goal(cloned, suite):
    limit = 70
    episodes = play(cloned, suite, dialogue_of(cloned, limit))
    samples = samples_of(episodes, "episode")
    assert len(samples) > len(episodes)
    goal = cloned.tokenizer(episodes[0].turns[0].observation.goal)["input_ids"]
    for sample in samples:
        text = cloned.tokenizer.decode(sample.prompt_ids)
        assert cloned.tokenizer.decode(goal) in text
    assert all(len(turn.prompt_ids) <= limit for episode in episodes for turn in episode.turns)


@pytest.mark.parametrize("limit", [70, 400])
def test_training_sees_what_the_engine_saw(cloned, suite, limit):
    samples = samples_of(play(cloned, suite, dialogue_of(cloned, limit)), "episode")
    learner_of(cloned).score(samples)
    for sample in samples:
        off = (sample.old_log_probs - sample.rollout_log_probs)[sample.mask]
        assert float(off.abs().max()) < 1e-5


def learner_of(policy, *settings):
    return Learner(policy, None, load_config("practice", [*SMALL, "rollout.layout=episode", *settings]))


@pytest.mark.parametrize("settings", [(), ("loss.penalty=hinge", "loss.band_scope=segment", "loss.penalty_alpha=2")])
def test_both_layouts_have_the_same_gradient(policy, played, settings):
    """Under token-mean, each turn's prompt being all of the dialogue before it; a segment is a turn in both."""
    gradients = []
    for layout in ("turn", "episode"):
        trained = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        samples = samples_of(played, layout)
        for sample in samples:
            sample.advantages = torch.tensor([0.5 - (sample.episode + turn) % 2 for turn in sample.turns])
        learner = learner_of(trained, "loss.entropy_coeff=0.1", "loss.band_high=0.9", *settings)
        learner.score(samples)
        metrics = learner._backward(samples, history_of(samples), 1.5, Stopwatch(torch.device("cpu"))).to_floats()
        gradients.append((torch.cat([p.grad.flatten() for p in trained.model.parameters()]), metrics))
    (by_turn, one), (whole, other) = gradients
    assert (by_turn - whole).norm() <= 1e-5 * by_turn.norm()
    assert by_turn.norm() > 0
    assert one["above_band_tokens"] == other["above_band_tokens"] > 0
    for name in ("loss", "pg_loss", "penalty", "tokens", "entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)


def test_checkpointed_layers_give_the_same_gradient(policy, played):
    gradients = []
    for settings in ((), ("model.gradient_checkpointing=true",)):
        trained = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        samples = samples_of(played, "episode")
        for sample in samples:
            sample.advantages = torch.full((len(sample.turns),), 1.0 - sample.episode % 2)
        learner = learner_of(trained, *settings)
        learner.score(samples)
        with patch.object(Qwen2MLP, "forward", autospec=True, side_effect=Qwen2MLP.forward) as layers:
            learner._backward(samples, history_of(samples), 1.0, Stopwatch(torch.device("cpu")))
        gradients.append((torch.cat([p.grad.flatten() for p in trained.model.parameters()]), layers.call_count))
        assert not any(module.training for module in trained.model.modules())
    (plain, once), (again, twice) = gradients
    assert torch.equal(plain, again)
    assert twice == 2 * once


def test_cloning_sees_the_dialogue_that_the_rollout_makes(cloned, suite):
    (demonstration,) = demonstrate(suite, 1)
    (sample,) = cloning_samples([demonstration], cloned, dialogue_of(cloned), 6, "episode")
    text = cloned.tokenizer.decode(sample.prompt_ids + sample.response_ids)
    for action, seen in zip(demonstration.actions, demonstration.observations, strict=True):
        assert f"{seen.text}\n{seen.scene}<|act|>{action}<|endoftext|>" in text


def test_a_template_that_hides_responses_is_refused(cloned):
    tokenizer = copy.deepcopy(cloned.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"rollout\.layout=turn"):
        dialogue_of(replace(cloned, tokenizer=tokenizer))
