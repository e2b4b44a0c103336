"""Advantages: how much better an episode was than the others of its group."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6  # verl's: keeps the quotient finite, and is far below any spread that rewards have


@dataclass
class GroupAdvantages:
    values: Tensor  # (E,) float32
    uniform_groups: int  # groups whose returns are all equal: their episodes teach nothing
    groups: int


def grpo_advantages(returns: Tensor, groups: Tensor, normalize_std: bool = True) -> GroupAdvantages:
    """Return minus the group's mean, over the group's standard deviation (unbiased, arXiv 2402.03300 as in verl).

    Args:
        returns: (E,) float, one an episode.
        groups: (E,) int, the group of each; a group of one has no other to compare with: advantage 0.
        normalize_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783).
    """
    values = torch.zeros(len(returns))
    uniform = 0
    present = groups.unique()
    for group in present:
        members = groups == group
        own = returns[members].double()
        if bool((own == own[0]).all()):
            uniform += 1
            continue
        centred = own - own.mean()
        values[members] = (centred / (own.std() + EPSILON) if normalize_std else centred).float()
    return GroupAdvantages(values, uniform, len(present))
