import pytest
import torch

from epo_kernels.train.advantages import grpo_advantages


def test_numbers_worked_by_hand():
    # Group 0: returns 0, 0, 1, 1: mean 1/2, unbiased deviation sqrt(1/3). Group 1: 1, 2, 6: mean 3, deviation sqrt(7).
    returns = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 6.0, 1.0])
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    out = grpo_advantages(returns, groups)
    root3, root7 = 3**0.5, 7**0.5
    wanted = [-root3 / 2, -2 / root7, -root3 / 2, -1 / root7, root3 / 2, 3 / root7, root3 / 2]
    assert out.values.tolist() == pytest.approx(wanted, abs=1e-5)
    assert (out.uniform_groups, out.groups) == (0, 2)


def test_without_the_deviation():
    out = grpo_advantages(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64), normalize_std=False)
    assert out.values.tolist() == [-2.0, -1.0, 3.0]


def test_groups_without_variance_are_counted_and_teach_nothing():
    # 0.1 three times: their mean in floating point isn't 0.1, and still nothing may come of it.
    out = grpo_advantages(torch.tensor([0.1, 0.1, 0.1, 0.7, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 2, 2]))
    assert out.values[:4].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert (out.uniform_groups, out.groups) == (2, 3)
    assert out.values[5] == -out.values[4] > 0
