"""The linear losses over the row kernels of every backend that runs on a CPU (Triton's in its interpreter)."""

import pytest
import torch

import epo_kernels as ek
from tests.test_linear import HINGE, NEEDS_CPU, ONE_OR_SEVERAL_CHUNKS, Case

BACKENDS = [pytest.param("cpu", marks=NEEDS_CPU), "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize(
    ("dtype", "upstream"),  # which is multiplied in the pass that casts to 16 bits
    [
        (torch.float32, 1.0),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 0.3),
        (torch.float16, 1.0),
        (torch.float16, 0.3),
    ],
)
@pytest.mark.parametrize("max_chunk_bytes", ONE_OR_SEVERAL_CHUNKS)
def test_error_is_that_of_eager_or_less(
    backend: str, scope: str, dtype: torch.dtype, max_chunk_bytes: int, upstream: float
) -> None:
    case, exact = Case(dtype), Case(dtype)
    cfg = ek.EPOConfig(band_scope=scope, kl_coeff=0.1, **HINGE)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    truth, eager = (one.run("reference", cfg, upstream) for one in (exact, case))
    ours = case.run(backend, cfg, upstream, max_chunk_bytes=max_chunk_bytes)
    for got, theirs, true in zip(ours, eager, truth, strict=True):
        rounded = torch.finfo(dtype).eps * max(1.0 if true.dim() == 0 else 0.0, float(true.norm()))
        assert (got.double() - true).norm() <= (theirs.double() - true).norm() + rounded


@NEEDS_CPU
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("log_ratio", "keywords", "upstream"),
    [
        (9.0, {}, 1.0),
        (9.0, {"max_chunk_bytes": 1}, 1.0),  # the scale falls at the token's chunk
        (9.0, {"normalizer": 2.0**26}, 65536.0),
        (16.0, {"loss_scale": 2.0**-8}, 1.0),
        (0.0, {"normalizer": 2.0**-8}, 1.0),
    ],
)
def test_float16_gradients_overflow_only_where_those_of_eager_do(logits_dtype, log_ratio, keywords, upstream):
    check_float16("cpu", logits_dtype, log_ratio, keywords, upstream)


def test_float16_gradients_of_triton_overflow_only_where_those_of_eager_do():
    check_float16("triton", None, 9.0, {}, 1.0)


def check_float16(backend, logits_dtype, log_ratio, keywords, upstream):
    """One token's gradient is far larger than the others'."""
    case, exact, cfg = Case(torch.float16), Case(torch.float16), ek.EPOConfig(clip_ratio_c=None)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    place = tuple(case.mask.nonzero()[40])
    for one in (case, exact):
        one.advantages[place], one.keywords["is_weights"][place] = -1.0, 1.0
        logits = exact.hidden @ exact.weight.t() + exact.bias
        one.old_log_probs[place] = logits.log_softmax(-1)[place][case.tokens[place]] - log_ratio
    truth = exact.run("reference", cfg, upstream, **keywords)
    eager = case.run("reference", cfg, upstream, logits_dtype=logits_dtype, **keywords)
    ours = case.run(backend, cfg, upstream, logits_dtype=logits_dtype, **keywords)
    for got, theirs, true in zip(ours[3:], eager[3:], truth[3:], strict=True):
        assert 1.0 < true.abs().max() < 60_000
        assert got.isfinite().all()
        rounding = torch.finfo(torch.float16).eps * true.norm()
        assert (got.double() - true).norm() <= (theirs.double() - true).norm() + rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_and_its_gradient(backend: str) -> None:
    case = Case(torch.float32)

    def run(backend: str) -> list[torch.Tensor]:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        log_probs, entropy = ek.linear_log_probs_and_entropy(
            hidden, weight, case.tokens, mask=case.mask, backend=backend, max_chunk_bytes=128 * (11 + 12) * 4
        )
        (log_probs.sin().sum() + entropy.square().sum()).backward()
        return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]

    for ours, theirs in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@NEEDS_CPU
def test_a_bias_is_rounded_together_with_its_product() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(*shape, generator=generator) for shape in ((2, 60, 64), (1003, 64), (1003,))]
    tokens = torch.randint(1003, (2, 60), generator=generator)

    def entropy(backend: str, dtype: torch.dtype) -> torch.Tensor:
        hidden, weight, bias = (value.half().to(dtype) for value in exact)
        _, entropy = ek.linear_log_probs_and_entropy(hidden, weight, tokens, bias=bias, backend=backend)
        return entropy.double()

    truth = entropy("reference", torch.float64)
    ours, eager = ((entropy(backend, torch.float16) - truth).norm() for backend in ("cpu", "reference"))
    assert ours <= 1.1 * eager
