"""The policy losses on the fused backends: against float64 by the three-way rule, and through the linear loss."""

from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.config import PolicyLossName
from tests.backends.matrix import BUSY, busy_case, check_three_ways
from tests.cases import POLICY_VARIANTS, policy_config
from tests.test_linear import NEEDS_CPU

TURNS = torch.arange(15).reshape(3, 5) // 2


def busy_policy_case(name, **arguments):
    """Band, KL, importance weights, and turns, with the logits' usual 40 columns."""
    terms = {field: getattr(BUSY, field) for field in ("penalty", "penalty_alpha", "entropy_coeff", "kl_coeff")}
    cfg = policy_config(name, **terms)
    return busy_case(cfg, vocab=40, segment_ids=TURNS, is_weights=0.5 + torch.rand(3, 5), **arguments)


@NEEDS_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICY_VARIANTS)
def test_cpu_is_as_exact_as_eager(name, dtype):
    for seed in range(2):
        check_three_ways(busy_policy_case(name, seed=seed, dtype=dtype), "cpu", "cpu", roundings=4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", get_args(PolicyLossName))
def test_triton_is_as_exact_as_eager(name):
    name = "dppo-kl" if name == "dppo" else name
    check_three_ways(busy_policy_case(name), "triton", "cpu", roundings=4)


@NEEDS_CPU
@pytest.mark.parametrize("name", POLICY_VARIANTS)
def test_linear_loss_equals_that_of_the_logits(name):
    case = busy_policy_case(name, dtype=torch.float32)
    logits = case.pop("logits")
    hidden, weight = logits.clone().requires_grad_(), torch.eye(40).requires_grad_()
    out = ek.linear_epo_loss(hidden, weight, **case, backend="cpu")
    out.loss.backward()
    leaf = logits.double().requires_grad_()
    expected = ek.epo_loss(leaf, **case, backend="reference")
    expected.loss.backward()
    assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert_close(hidden.grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)
    assert out.metrics.clipped_tokens == expected.metrics.clipped_tokens
    if not case["cfg"].is_per_token:
        assert out.metrics.recomputed_tokens == out.metrics.tokens
