"""A rank that dies during a call: the others raise an error."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from torch import distributed as dist

import epo_kernels as ek
from tests.sharded.vocabulary import FUSED, own_columns
from tests.test_linear import Case, V


def case_a_rank_dies(rank, world):
    case, columns = Case(torch.float32), own_columns(V, rank, world, "even")
    all_reduce, calls = dist.all_reduce, []

    def dying(*args, **kwargs):
        calls.append(None)
        if rank == world - 1 and len(calls) == 3:
            os._exit(7)
        return all_reduce(*args, **kwargs)

    def loss():
        hidden, weight = (value.clone().requires_grad_() for value in (case.hidden, case.weight[columns]))
        batch = case.tokens, None, case.advantages, case.mask, ek.EPOConfig()
        ek.linear_epo_loss(hidden, weight, *batch, group=dist.group.WORLD, backend=FUSED, max_chunk_bytes=1)

    with mock.patch.object(dist, "all_reduce", dying), pytest.raises(RuntimeError):
        loss()
