"""The Triton kernels on a GPU: the matrix of tests/backends, and GPU-only behaviour."""

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.backends import choose_backend, triton
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import BUSY, BackendMatrix, busy_case, moved
from tests.cases import assert_identical, run

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


class TestTriton(BackendMatrix, AutogradMatrix):
    backend = "triton"
    device = "cuda"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("vocab", [8192, 8193, 32_000, 128_256, 151_936])
    def test_every_way_to_take_a_row(self, vocab, dtype):
        self.check(busy_case(vocab=vocab, dtype=dtype, batch=2, time=4))


def loss_of(case, **arguments):
    return ek.epo_loss(**case, backend="triton", **arguments)


def test_auto_takes_the_backend_that_was_faster_here():
    on_hopper = torch.cuda.get_device_capability()[0] == 9 and ek.available_backends()["cuda"] is None
    assert choose_backend("auto", CUDA).name == ("cuda" if on_hopper else "triton")


def test_more_rows_than_a_grid_has_in_y():
    """70,000 rows, in which few tokens differ from the rest."""
    case = moved(busy_case(vocab=64, batch=7, time=10_000), CUDA)
    out, gradient = run(case, "triton")
    expected, expected_gradient = run(case, "reference")
    assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-6)
    assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-8)
    assert_close(out.metrics.values, expected.metrics.values, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["contiguous", "vocab"])
def test_offsets_past_2_to_the_31(kind):
    """2.3e9 logits: the last rows are beyond 32-bit addresses, and equal a small batch of the same rows."""
    rows, vocab = 16_384, 140_000
    shape, order = ((rows, vocab), (0, 1)) if kind == "contiguous" else ((vocab, rows), (1, 0))
    logits = torch.zeros(shape, dtype=torch.bfloat16, device=CUDA).permute(order)[None]
    case = moved(busy_case(vocab=vocab, dtype=torch.bfloat16, batch=1, time=4), CUDA)
    logits[:, -4:] = case["logits"]

    def padded(value):
        if isinstance(value, tuple):
            return tuple(map(padded, value))
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        return torch.cat([value.new_zeros(1, rows - 4), value], dim=1)

    large = {name: padded(value) for name, value in case.items() if name != "logits"}
    _, expected = run(case, "triton")
    _, gradient = run({**large, "logits": logits}, "triton")
    assert_close(gradient[:, -4:], expected, rtol=2**-7, atol=1e-9)
    assert not gradient[:, :-4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_syncs(dtype):
    case = moved(busy_case(vocab=1000, dtype=dtype), CUDA)
    logits = case.pop("logits").requires_grad_()
    coefficient = torch.tensor(0.1, device=CUDA)
    loss_of({**case, "logits": logits}, entropy_coeff=coefficient).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = loss_of({**case, "logits": logits}, entropy_coeff=coefficient, penalty_weight=1.5)
        (0.5 * out.loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_call_is_three_launches():
    case = moved(busy_case(vocab=32_000, dtype=torch.bfloat16), CUDA)
    case["mask"] = case["mask"].bool()
    case["logits"].requires_grad_()
    loss_of(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss_of(case)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= 3, kernels  # weights, rows, and the metrics' concatenation


def test_a_schedule_of_numbers_compiles_no_kernel_again():
    case = moved(busy_case(vocab=1000), CUDA)
    loss_of(case)
    kernel = choose_backend("triton", CUDA).kernels._kernels.row_loss_kernel
    before = sum(len(cache[0]) for cache in kernel.device_caches.values())
    for i in range(5):
        loss_of(case, entropy_coeff=0.1 / (i + 1), penalty_weight=float(i), loss_scale=1.0 + i)
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == before


def test_a_cuda_graph_replays_it():
    case = moved(busy_case(vocab=5000, dtype=torch.bfloat16), CUDA)
    case["mask"] = case["mask"].bool()
    logits = case["logits"].requires_grad_()
    coefficient = torch.tensor(0.1, device=CUDA)

    def step():
        out = loss_of(case, entropy_coeff=coefficient)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, logits))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (0.1, 0.7):
        coefficient.fill_(value)
        graph.replay()
        for got, wanted in zip(captured, step(), strict=True):
            assert_close(got, wanted, rtol=0, atol=0)


def test_the_same_bits_on_a_busy_machine():
    case = moved(busy_case(vocab=40_000, dtype=torch.bfloat16, batch=8, time=200), CUDA)
    first = run(case, "triton")
    for _ in range(3):
        assert_identical(run(case, "triton"), first)


def test_another_stream():
    case = moved(busy_case(vocab=40_000, dtype=torch.bfloat16), CUDA)
    expected = run(case, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(case, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert_identical(got, expected)


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_inductor_compiles_it_whole(scope):
    cfg = ek.EPOConfig(**{**vars(BUSY), "band_scope": scope})
    case = moved(busy_case(cfg, vocab=3000, dtype=torch.bfloat16), CUDA)
    expected = run(case, "triton")
    torch._dynamo.reset()
    logits = case["logits"].detach().requires_grad_()
    compiled = torch.compile(lambda logits: loss_of({**case, "logits": logits}), fullgraph=True)
    out = compiled(logits)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert_close(out.loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert_close(gradient, expected[1], rtol=2**-6, atol=1e-6)


def test_the_chip_is_read_from_the_device():
    chip = triton.chip_of(torch.device("cuda", torch.cuda.current_device()))
    assert chip.processors > 1
    assert chip.l2_bytes > 1 << 20
