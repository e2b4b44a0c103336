"""The linear losses on a GPU, whose products with a wider result exist only there."""

import pytest
import torch

import epo_kernels as ek

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
B, T, D, V = 2, 60, 64, 1003
CFG = ek.EPOConfig(penalty="hinge", penalty_alpha=2.0, entropy_coeff=0.1, kl_coeff=0.1)
NAMES = ("loss", "log_probs", "entropy", "grad_hidden", "grad_weight", "grad_bias")


def poison_free_memory():
    """Memory of the size of ∂weight that PyTorch hands out next is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.full((V, D), float("nan"), device=DEVICE, dtype=dtype)


def outcome(backend, leaves, upstream, **keywords):
    """Loss, statistics and gradients; the draws are the same in every call."""
    poison_free_memory()
    generator = torch.Generator().manual_seed(0)
    old, advantages, reference = (torch.randn(B, T, generator=generator).to(DEVICE) for _ in range(3))
    tokens = torch.randint(V - 3, (B, T), generator=generator).to(DEVICE)
    mask = (torch.rand(B, T, generator=generator) < 0.7).to(DEVICE)
    hidden, weight, bias = (leaf.detach().requires_grad_() for leaf in leaves)
    out = ek.linear_epo_loss(
        hidden,
        weight,
        tokens,
        old - 7.0,
        advantages,
        mask,
        CFG,
        bias=bias,
        backend=backend,
        entropy_bounds=(torch.full((B, T), 5.0, device=DEVICE), torch.full((B, T), 6.0, device=DEVICE)),
        ref_log_probs=reference - 7.0,
        **keywords,
    )
    gradients = torch.autograd.grad(upstream * out.loss, (hidden, weight, bias))
    return out.loss.detach(), out.log_probs, out.entropy, *gradients


@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("keywords", [{}, {"vocab_size": V - 3}, {"max_chunk_bytes": 1}], ids=str)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_error_is_that_of_eager_or_less(backend, dtype, logits_dtype, keywords, upstream):
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((B, T, D), (V, D), (V,))]
    truth = outcome("reference", [leaf.double() for leaf in leaves], upstream, **keywords)
    keywords = {**keywords, "logits_dtype": logits_dtype}
    eager, ours = (outcome(name, leaves, upstream, **keywords) for name in ("reference", backend))
    for name, got, theirs, true in zip(NAMES, ours, eager, truth, strict=True):
        own, others = ((values.double() - true).norm() for values in (got, theirs))
        rounding = torch.finfo(dtype).eps * true.norm()
        assert own <= others + rounding, f"{name}: error {own:.3g}, eager's {others:.3g}, a rounding {rounding:.3g}"
