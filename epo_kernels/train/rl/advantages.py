"""Advantage estimators, as pure functions of tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # as in verl: keeps the quotient finite, and is far below any spread of rewards


def grpo_advantages(returns: Tensor, groups: Tensor, normalize_std: bool = True) -> Tensor:
    """Return minus the group's mean, divided by its standard deviation (unbiased; arXiv 2402.03300 as in verl).

    Args:
        returns: (N,) float, one per member.
        groups: (N,) int, group of each member; a group of one has advantage 0.
        normalize_std: False omits the division (Dr. GRPO, arXiv 2503.20783).

    Returns:
        (N,) float32; exactly 0 in a group whose returns are all equal.
    """

    def centred(own: Tensor) -> Tensor:
        difference = own - own.mean()
        return difference / (own.std() + EPSILON) if normalize_std else difference

    return _by_group(returns, groups, centred)


def rloo_advantages(returns: Tensor, groups: Tensor) -> Tensor:
    """Return minus the mean of the other members (leave-one-out, arXiv 2402.14740); same arguments as above."""
    return _by_group(returns, groups, lambda own: (own - own.mean()) * (len(own) / (len(own) - 1)))


def groups_without_spread(returns: Tensor, groups: Tensor) -> list[int]:
    """Groups whose returns are all equal, which give no learning signal. A group of one is such a group."""
    return [int(group) for group in groups.unique() if bool(_equal(returns[groups == group]))]


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """(T,) rewards of an episode -> (T,) float64 discounted returns-to-go."""
    totals, total = torch.zeros(len(rewards), dtype=torch.float64), 0.0
    for step in range(len(rewards) - 1, -1, -1):
        total = float(rewards[step]) + gamma * total
        totals[step] = total
    return totals


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) of one complete episode or segment.

    Each state's value stands for all later rewards; the value after the last action is 0. (An episode that runs out of
    turns is treated as terminated: the limit is part of its task.)

    Args:
        rewards: (T,) float, reward of each action.
        values: (T,) float, value of the state before each action.
        gamma: discount from one action to the next.
        lam: λ; 1 uses rewards only, 0 the next state's value.

    Returns:
        (advantages, returns), (T,) float64 each; returns are advantages + values, the critic's targets.
    """
    advantages, advantage, following = torch.zeros(len(rewards), dtype=torch.float64), 0.0, 0.0
    for step in range(len(rewards) - 1, -1, -1):
        value = float(values[step])
        surprise = float(rewards[step]) + gamma * following - value
        advantage = surprise + gamma * lam * advantage
        advantages[step], following = advantage, value
    return advantages, advantages + values.double()


def whiten(advantages: Tensor) -> Tensor:
    """(N,) normalised to mean 0 and (unbiased) standard deviation 1; 0 if all are equal."""
    return grpo_advantages(advantages, torch.zeros(len(advantages), dtype=torch.int64))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant; NaN without variance."""
    variance = returns.double().var(unbiased=False)
    return float(1 - (returns.double() - values.double()).var(unbiased=False) / variance) if variance else float("nan")


def _equal(values: Tensor) -> Tensor:
    return (values == values[0]).all()


def _by_group(returns: Tensor, groups: Tensor, compare: Callable[[Tensor], Tensor]) -> Tensor:
    values = torch.zeros(len(returns))
    for group in groups.unique():
        members = groups == group
        own = returns[members].double()
        if not bool(_equal(own)):  # the floating-point mean of equal values may differ from them
            values[members] = compare(own).float()
    return values
