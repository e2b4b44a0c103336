"""The linear losses over the row kernels of every backend that runs on a CPU: Triton's by its interpreter."""

import pytest
import torch

import epo_kernels as ek
from tests.test_linear import HINGE, NEEDS_CPU, Case

BACKENDS = [pytest.param("cpu", marks=NEEDS_CPU), "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_eager_or_less(backend: str, scope: str, dtype: torch.dtype) -> None:
    case, exact = Case(dtype), Case(dtype)
    cfg = ek.EPOConfig(band_scope=scope, kl_coeff=0.1, **HINGE)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    truth, eager, ours = exact.run("reference", cfg), case.run("reference", cfg), case.run(backend, cfg)
    for got, theirs, true in zip(ours, eager, truth, strict=True):
        rounded = torch.finfo(dtype).eps * max(1.0 if true.dim() == 0 else 0.0, float(true.norm()))
        assert (got.double() - true).norm() <= (theirs.double() - true).norm() + rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_and_its_gradient(backend: str) -> None:
    case = Case(torch.float32)

    def run(backend: str) -> list[torch.Tensor]:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        log_probs, entropy = ek.linear_log_probs_and_entropy(
            hidden, weight, case.tokens, mask=case.mask, backend=backend, max_chunk_bytes=128 * 11 * 4
        )
        (log_probs.sin().sum() + entropy.square().sum()).backward()
        return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]

    for ours, theirs in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
