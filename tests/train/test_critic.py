import copy
import dataclasses

import pytest
import torch

from epo_kernels.train.config import load_config
from epo_kernels.train.data import samples_of
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.rl.critic import Critic, value_loss
from tests.train.conftest import SMALL
from tests.train.test_rollout import episodes_of, rollout_of


@pytest.fixture(scope="module")
def played(cloned, suite):
    episodes = episodes_of(suite.tasks("train")[:4])
    with EnvironmentPool(suite, 4) as pool:
        rollout_of(pool, cloned, max_turns=suite.max_turns).play(episodes)
    return episodes


def critic_of(policy, *settings):
    return Critic(policy, load_config("practice", [*SMALL, "algorithm.name=ppo", "critic.lr=1e-3", *settings]))


def with_targets(played):
    """Samples whose returns differ between early and late turns."""
    samples = samples_of(played, "turn")
    for sample in samples:
        sample.returns = torch.full((len(sample.turns),), float(sample.turns[0] >= 2))
    return samples


def test_the_clipped_loss_by_hand():
    # Clip range 1/2. Inside it; moved towards the target beyond it (the clipped error, larger, decides); moved away
    # beyond it (its own error is the larger).
    values, old, returns = torch.tensor([0.25, 1.0, -1.0]), torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    loss, clipped = value_loss(values, old, returns, clip_range=0.5)
    assert loss.tolist() == [0.5 * 0.75**2, 0.5 * 0.5**2, 0.5 * 2.0**2]
    assert clipped.tolist() == [False, True, False]


def test_clipping_stops_the_gradient():
    values = torch.tensor([0.25, 1.0, -1.0], requires_grad=True)
    value_loss(values, torch.zeros(3), torch.ones(3), clip_range=0.5)[0].sum().backward()
    assert values.grad.tolist() == [-0.75, 0.0, -2.0]


@pytest.mark.parametrize("level", ["turn", "token"])
def test_it_learns_what_to_expect_and_leaves_the_policy_alone(policy, played, level):
    before = copy.deepcopy(policy.model.state_dict())
    samples = with_targets(played)
    critic = critic_of(policy, f"algorithm.gae={level}", "critic.epochs=16", "critic.clip_range=10", "steps=2")
    critic.score(samples)
    assert all(sample.values.tolist() == [0.0] * len(sample.turns) for sample in samples)  # it knows nothing yet
    reported = []
    first = critic.update(samples, (0,), reported.append)
    assert reported[-1] == 16 * len(samples)
    critic.score(samples)
    second = critic.update(samples, seed=(1,))
    assert second["critic/vf_loss"] < 0.5 * first["critic/vf_loss"]
    assert second["critic/grad_norm"] > 0
    assert second["critic/skipped_updates"] == 0
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_a_value_of_what_came_before_alone(policy, played):
    samples = with_targets(played)
    critic = critic_of(policy, "critic.epochs=3")
    critic.score(samples)
    critic.update(samples, seed=(0,))
    (whole,) = samples[:1]
    assert len(whole.response_ids) > 1
    cut = dataclasses.replace(whole, response_ids=whole.response_ids[:1], turns=whole.turns[:1])
    critic.score([whole])
    critic.score([cut])
    assert cut.values[0] == pytest.approx(float(whole.values[0]), abs=1e-5)
    assert len(set(whole.values.tolist())) > 1


def test_micro_batches_add_up(policy, played):
    gradients = []
    for tokens in (100_000, 200):
        samples = with_targets(played)
        critic = critic_of(policy, f"optim.micro_batch_tokens={tokens}")
        torch.nn.init.ones_(critic._head.weight)
        critic.score(samples)
        loss, *_ = critic._backward(samples)
        gradients.append((torch.cat([p.grad.flatten() for p in critic._network.parameters()]), float(loss)))
    (whole, one), (parts, many) = gradients
    assert (whole - parts).norm() <= 1e-4 * whole.norm()
    assert one == pytest.approx(many, rel=1e-5)


def test_it_comes_back_from_a_checkpoint(policy, played):
    samples = with_targets(played)
    critic = critic_of(policy)
    critic.score(samples)
    critic.update(samples, seed=(0,))
    again = critic_of(policy)
    again.load_state_dict(critic.state_dict())
    results = []
    for one in (critic, again):
        one.score(samples)
        metrics = one.update(samples, seed=(1,))
        results.append((metrics, [sample.values.tolist() for sample in samples]))
    assert results[0] == results[1]
