"""Random shapes for the CUDA kernels, on a GPU and on the emulated one."""

from __future__ import annotations

import random

import torch

import epo_kernels as ek
from tests.backends.matrix import DTYPES, busy_case, check_three_ways, moved
from tests.cases import assert_identical, run


def random_rows(draw: random.Random, most_bytes: int) -> dict:
    """A few rows of limited size, some masked, some padded; odd widths give rows of every alignment."""
    dtype = draw.choice(DTYPES)
    width = draw.randint(1, most_bytes // dtype.itemsize)
    shape = {"batch": draw.randint(1, 3), "time": draw.randint(1, 4), "seed": draw.randrange(1000)}
    case = busy_case(vocab=width, dtype=dtype, **shape)
    if draw.random() < 0.3:
        padded = width - draw.randint(0, min(width - 1, 9))
        case = {**case, "vocab_size": padded, "tokens": case["tokens"] % padded}
    return case


def run_in_place(case, backend):
    """`run`, with the gradient written over the logits."""
    leaf = case["logits"].detach().clone().requires_grad_()
    out = ek.epo_loss(**{**case, "logits": leaf * 1.0}, inplace=True, backend=backend)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def check_again_and_again(case, backend, device, before_each=lambda time: None, times=3):
    """As accurate as eager, and bit-identical each time, also in place. before_each(time): e.g. another schedule."""
    expected = check_three_ways(case, backend, device, roundings=4)
    for time in range(1, times + 1):
        before_each(time)
        assert_identical(run(moved(case, device), backend), expected)
    assert_identical(run_in_place(moved(case, device), backend), expected)
