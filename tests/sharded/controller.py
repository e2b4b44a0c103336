"""Cases of the entropy controller on ranks: called as (rank, world) on every rank, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

import epo_kernels as ek
from tests.sharded.data_parallel import _alone
from tests.test_controller import RULES


def case_one_coefficient_on_all_ranks(rank, world):
    """Uneven numbers of tokens, none on the last rank; all ranks end with the coefficient of one process."""
    for rule, settings in RULES.items():
        whole, shared = ek.EntropyController(0.3, rule, **settings), ek.EntropyController(0.3, rule, **settings)
        for step in range(6):
            entropy = 0.6 * torch.rand(1000, generator=torch.Generator().manual_seed(step))
            owner = (torch.arange(1000) ** 2 % 7).clamp(max=world - 1)
            if step % 2:
                owner = owner.clamp(max=world - 2)
            whole.update(entropy, group=_alone(rank))
            shared.update(entropy, owner == rank, group=dist.group.WORLD)
            told = [torch.zeros(()) for _ in range(world)]
            dist.all_gather(told, shared.entropy_coeff)
            assert len({float(value) for value in told}) == 1
            assert float(shared.entropy_coeff) == pytest.approx(float(whole.entropy_coeff), rel=1e-6, abs=1e-12), rule


def case_no_rank_has_a_token(rank, world):
    controller = ek.EntropyController(0.3, entropy_coeff=0.1)
    controller.update(torch.zeros(0), group=dist.group.WORLD)
    assert controller.state_dict() == ek.EntropyController(0.3, entropy_coeff=0.1).state_dict()


def case_a_rank_by_itself_is_warned_of(rank, world):
    with pytest.warns(UserWarning, match="pass group="):
        ek.EntropyController(0.3).update(torch.ones(2))
