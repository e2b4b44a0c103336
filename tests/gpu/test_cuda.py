"""The CUDA kernels on a GPU: the matrix of every backend, and each family of kernels over its intended widths.

tests/native/test_emulated_cuda.py runs the same matrices and random shapes on an emulated GPU.
"""

import random

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.backends.cuda import CudaRows
from epo_kernels.fused.backend import FusedBackend
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import DTYPES, BackendMatrix, assert_no_worse, busy_case, check_three_ways, moved
from tests.backends.shapes import check_again_and_again, random_rows
from tests.cases import assert_identical, run

pytestmark = pytest.mark.gpu
# Rows of 1, 2 and 4 blocks in bfloat16, an odd one whose rows lie at every alignment, and one too short for a ring.
WIDTHS = (500, 32_000, 49_157, 128_256, 151_936, 248_320, 262_144)
FAMILIES = ("sweeps", "ring")


class TestCuda(BackendMatrix, AutogradMatrix):
    backend = "cuda"
    device = "cuda"


@pytest.fixture
def family(request, monkeypatch):
    """Forces one family of kernels for losses with backend="cuda"."""
    backend = ek.backends.choose_backend("cuda", torch.device("cuda"))
    assert isinstance(backend, FusedBackend)
    monkeypatch.setattr(backend, "kernels", CudaRows(request.param))
    return request.param


def test_the_backend_can_run():
    assert ek.available_backends()["cuda"] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_width_and_dtype(family, width, dtype):
    if family == "ring" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the ring needs clusters: compute capability 9.0")
    case = busy_case(vocab=width, dtype=dtype, batch=2, time=9)
    check_three_ways(case, "cuda", "cuda")
    check_three_ways({**case, "vocab_size": width - 3, "tokens": case["tokens"] % (width - 3)}, "cuda", "cuda")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_random_shapes(family, seed):
    if family == "ring" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the ring needs clusters: compute capability 9.0")
    check_again_and_again(random_rows(random.Random(seed), 600_000), "cuda", "cuda")


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_more_rows_than_blocks(family):
    """Rows follow each other through a ring, masked ones between them."""
    if family == "ring" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the ring needs clusters: compute capability 9.0")
    case = busy_case(vocab=40_001, dtype=torch.bfloat16, batch=7, time=301)
    _, gradient = check_three_ways(case, "cuda", "cuda")
    again = run(moved(case, "cuda"), "cuda")
    assert_close(again[1], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_in_place_equals_out_of_place(family):
    if family == "ring" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the ring needs clusters: compute capability 9.0")
    case = moved(busy_case(vocab=50_021, dtype=torch.bfloat16, batch=2, time=200), "cuda")
    _, expected = run(case, "cuda")
    leaf = case["logits"].detach().clone().requires_grad_()
    logits = leaf * 1.0
    out = ek.epo_loss(**{**case, "logits": logits}, inplace=True, backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert_close(gradient, expected, rtol=0, atol=0)


def test_families_agree():
    case = moved(busy_case(vocab=151_936, dtype=torch.bfloat16, batch=1, time=300), "cuda")
    backend = ek.backends.choose_backend("cuda", torch.device("cuda"))
    results = []
    for kernels in (CudaRows("sweeps"), CudaRows("chosen")):
        backend.__dict__["kernels"] = kernels
        results.append(run(case, "cuda"))
    del backend.__dict__["kernels"]
    (one, gradient), (other, other_gradient) = results
    for name in ("loss", "log_probs", "entropy"):
        assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    assert_close(gradient, other_gradient, rtol=2**-7, atol=1e-9)


def test_more_than_2_to_the_31_elements_and_65535_rows():
    rows, width = 70_001, 32_000
    logits = torch.randn(1, rows, width, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(width, (1, rows), device="cuda")
    mask = torch.ones(1, rows, device="cuda", dtype=torch.bool)
    leaf = logits.requires_grad_()
    out = ek.epo_loss(leaf, tokens, None, torch.ones(1, rows, device="cuda"), mask, ek.EPOConfig(), backend="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    last = slice(rows - 8, rows)
    truth = logits[:, last].detach().double().requires_grad_()
    log_probs, _ = ek.log_probs_and_entropy(truth, tokens[:, last], backend="reference")
    assert_close(out.log_probs[:, last].double(), log_probs.detach(), rtol=1e-5, atol=1e-5)
    assert gradient[:, last].float().sum(-1).abs().max() < 1e-6
    assert gradient[:, last].count_nonzero() > 4 * width


def test_a_launch_can_be_captured_in_a_graph():
    case = moved(busy_case(vocab=33_000, dtype=torch.bfloat16, batch=2, time=50), "cuda")
    case["logits"].requires_grad_()

    def step():
        out = ek.epo_loss(**case, backend="cuda")
        return out, torch.autograd.grad(out.loss, case["logits"])[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            case["logits"].copy_(torch.randn_like(case["logits"]))
        graph.replay()
        assert_identical(captured, step())


def test_nothing_syncs():
    case = moved(busy_case(vocab=33_000, dtype=torch.bfloat16), "cuda")
    coefficient = torch.tensor(0.1, device="cuda")
    run(case, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, "cuda")
        run({**case, "entropy_coeff": coefficient}, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_and_their_gradient_over_strides():
    logits = torch.randn(3, 40, 5001, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(5000, (3, 40), device="cuda")
    upstream = torch.randn(2, 3, 40, device="cuda", dtype=torch.float64)

    def both(values, backend):
        leaf = values.detach().requires_grad_()
        log_probs, entropy = ek.log_probs_and_entropy(leaf, tokens, temperature=0.7, vocab_size=5000, backend=backend)
        total = (log_probs * upstream[0]).sum() + (entropy * upstream[1]).sum()
        return log_probs, entropy, torch.autograd.grad(total, leaf)[0]

    truth, eager = both(logits.double(), "reference"), both(logits, "reference")
    for view in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1), logits.mT.contiguous().mT):
        for a, b, c in zip(both(view, "cuda"), eager, truth, strict=True):
            assert_no_worse("statistics", a, b, c, torch.finfo(torch.bfloat16).eps * c.abs().max().item())
