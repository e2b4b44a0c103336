import math

import pytest
import torch

from epo_kernels.train.rl.advantages import (
    explained_variance,
    gae,
    groups_without_spread,
    grpo_advantages,
    returns_to_go,
    rloo_advantages,
    whiten,
)

# Group 0: returns 0, 0, 1, 1: mean 1/2, unbiased deviation sqrt(1/3). Group 1: 1, 2, 6: mean 3, deviation sqrt(7).
RETURNS = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 6.0, 1.0])
GROUPS = torch.tensor([0, 1, 0, 1, 0, 1, 0])


def test_grpo_by_hand():
    root3, root7 = 3**0.5, 7**0.5
    wanted = [-root3 / 2, -2 / root7, -root3 / 2, -1 / root7, root3 / 2, 3 / root7, root3 / 2]
    assert grpo_advantages(RETURNS, GROUPS).tolist() == pytest.approx(wanted, abs=1e-5)


def test_without_the_deviation():
    values = grpo_advantages(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64), normalize_std=False)
    assert values.tolist() == [-2.0, -1.0, 3.0]


def test_rloo_leaves_its_own_return_out():
    # In group 1: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2. In group 0: 0 - 2 / 3 and 1 - 1 / 3.
    wanted = [-2 / 3, -3.0, -2 / 3, -1.5, 2 / 3, 4.5, 2 / 3]
    assert rloo_advantages(RETURNS, GROUPS).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("compare", [grpo_advantages, rloo_advantages])
def test_groups_without_spread_teach_nothing(compare):
    # 0.1 three times: their mean in floating point isn't 0.1, and still nothing may come of it. 0.7 is alone.
    returns, groups = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    values = compare(returns, groups)
    assert values[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert values[5] == -values[4] > 0
    assert groups_without_spread(returns, groups) == [0, 1]


def test_returns_to_go():
    assert returns_to_go(torch.tensor([1.0, 0.0, 4.0]), 0.5).tolist() == [2.0, 2.0, 4.0]
    assert returns_to_go(torch.tensor([1.0, 0.0, 4.0]), 1.0).tolist() == [5.0, 4.0, 4.0]


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2. Surprises: 4 - 2 = 2; 0 + 2/2 - 1 = 0; 1 + 1/2 - 3 = -3/2; each carries 1/4 of the next.
    advantages, returns = gae(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([3.0, 1.0, 2.0]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-1.5 + 0.5 / 4, 0.5, 2.0]
    assert returns.tolist() == [1.625, 1.5, 4.0]


def test_gae_between_its_ends():
    rewards, values = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([3.0, 1.0, 2.0])
    trusting_rewards, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    assert trusting_rewards.tolist() == [5.0 - 3, 4.0 - 1, 4.0 - 2]
    assert returns.tolist() == [5.0, 4.0, 4.0]
    trusting_critic, returns = gae(rewards, values, gamma=1.0, lam=0.0)
    assert trusting_critic.tolist() == [1.0 + 1 - 3, 0.0 + 2 - 1, 4.0 - 2]
    assert returns.tolist() == [2.0, 2.0, 4.0]  # each reward and the next value: the last has none


def test_whitening_and_explained_variance():
    white = whiten(torch.tensor([1.0, 2.0, 6.0]))
    assert white.tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], abs=1e-5)
    assert whiten(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns + 3, returns) == 1.0  # an offset isn't variance
    assert explained_variance(torch.ones(4), returns) == 0.0
    assert explained_variance(torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 0.0, 4.0])) == 0.75
    assert math.isnan(explained_variance(torch.ones(2), torch.ones(2)))
