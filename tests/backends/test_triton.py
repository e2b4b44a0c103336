"""The Triton kernels in the interpreter, and their launch rules."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels import backends
from epo_kernels.backends import triton
from epo_kernels.declaration import COEFFICIENTS
from epo_kernels.fused import backend as fused
from epo_kernels.fused.rows import Rows, Terms
from epo_kernels.inputs import Aggregation, LogitTransform
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import BackendMatrix, busy_case
from tests.cases import MODES, run

H200 = triton.Chip(processors=132, l2_bytes=60 << 20)
pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NumPy, on the NaN and infinities that are tested
]


class TestTriton(BackendMatrix, AutogradMatrix):
    backend = "triton"


def small_tiles(mode, width, itemsize, aligned, heavy, chip):
    """Two sweeps and several tiles for the smallest rows, several rows for each of two programs."""
    plan = triton.launch_plan(mode, width, itemsize, aligned, heavy, chip)
    lanes = max(1 << (width // (8 * plan.vector)).bit_length(), 4)
    return replace(plan, depth=2, lanes=lanes, one_tile=False, programs=2)


class TestTritonInTwoSweeps(BackendMatrix):
    backend = "triton-two-sweeps"

    @pytest.fixture(autouse=True)
    def _register(self, monkeypatch):
        rows = partial(triton.TritonRows, small_tiles)
        backend = triton.TritonBackend(self.backend, ("cuda",), rows, triton.why_unavailable)
        monkeypatch.setitem(backends._BACKENDS, self.backend, backend)


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["statistics", "gradient", "loss"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 2, 255, 256, 1000, 8192, 8193, 32_000, 151_936, 262_144, 1 << 20])
def test_a_plan_is_one_that_the_kernels_can_take(width, itemsize, mode):
    for aligned, heavy in product((True, False), repeat=2):
        plan = triton.launch_plan(mode, width, itemsize, aligned, heavy, H200)
        for length in (plan.depth, plan.lanes, plan.vector, plan.warps):
            assert length & (length - 1) == 0  # powers of two, as Triton's tiles must be
        assert plan.lanes == 32 * plan.warps
        assert plan.vector * itemsize == (16 if aligned else itemsize)
        assert not plan.one_tile or plan.depth * plan.lanes * plan.vector >= width
        assert 1 <= plan.programs <= 132 * 16


def test_small_programs_fill_the_registers_and_the_plan_says_whether_their_rows_fit_the_cache():
    for width, fits in ((16_384, True), (32_000, True), (128_256, False), (1 << 20, False)):
        plan = triton.launch_plan("loss", width, 2, True, False, H200)
        assert (plan.warps, plan.programs) == (4, 4 * 132)
        assert plan.rereads_hit_l2 == fits == (plan.programs * width * 2 <= 0.7 * (60 << 20))


# ---- the byte model --------------------------------------------------------------------------------------------------


@contextmanager
def counted_bytes(monkeypatch, tensor):
    """Bytes that the interpreter loads from and stores to the memory of a tensor."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = {"loaded": 0, "stored": 0}
    first = tensor.data_ptr()
    end = first + tensor.numel() * tensor.element_size()

    def count(kind, pointers, mask):
        inside = (pointers.data >= first) & (pointers.data < end) & mask.data
        counts[kind] += int(inside.sum()) * tensor.element_size()

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        count("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        count("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield counts


def protocol_arguments(kernels, case, vocab_size):
    """(rows, terms) of a case, as the kernels see them."""
    rows = Rows(case["logits"], case["tokens"] % vocab_size, case["mask"], LogitTransform(vocab_size, 1.0, None, None))
    prepared = kernels.prepare(
        rows.mask, Aggregation("token-mean", None, 3, None, None, 1.0), (0.2,) * len(COEFFICIENTS)
    )
    terms = Terms(
        **{name: value for name, value in prepared._asdict().items() if name != "extras"},
        **dict.fromkeys(("old_log_probs", "ref_log_probs", "is_weights", "lower", "upper")),
        advantages=case["advantages"],
        policy_loss="ppo",
        penalty="none",
        kl_type="k3",
    )
    return rows, terms


@pytest.mark.parametrize("plan", [triton.launch_plan, small_tiles])
@pytest.mark.parametrize(("width", "vocab_size"), [(1008, 1008), (999, 999), (1008, 300)])
def test_the_byte_model_is_what_the_kernels_move(width, vocab_size, plan, monkeypatch):
    case = busy_case(vocab=width, dtype=torch.bfloat16)
    logits, mask = case["logits"], case["mask"]
    kernels, out = triton.TritonRows(plan), torch.empty_like(logits)
    rows, terms = protocol_arguments(kernels, case, vocab_size)
    chip = triton.chip_of(torch.device("cpu"))
    statistics = kernels.statistics(rows, entropy=True)

    def run_mode(mode, writes):
        if mode == "statistics":
            kernels.statistics(rows, entropy=True)
        elif mode == "gradient":
            kernels.gradient(rows, statistics, terms.weights, terms.weights, out)
        else:
            kernels.loss(rows, terms, out if writes else None)

    for mode, writes in (("statistics", False), ("gradient", True), ("loss", True), ("loss", False)):
        shape = {"width": width, "vocab_size": vocab_size, "itemsize": 2, "writes": writes}
        chosen = plan(mode, width, 2, width % 16 == 0, vocab_size < width, chip)
        per_row = [triton.row_traffic(mode, chosen, counted=bool(m), **shape) for m in mask.flatten()]
        with counted_bytes(monkeypatch, logits) as read:
            run_mode(mode, writes)
        with counted_bytes(monkeypatch, out) as written:
            run_mode(mode, writes)
        assert read == {"loaded": sum(row.loaded for row in per_row), "stored": 0}, mode
        assert written == {"loaded": 0, "stored": sum(row.stored for row in per_row)}, mode
        assert all(row.needed <= row.loaded + row.stored for row in per_row)


def test_a_launch_leaves_its_ticket_for_the_next():
    kernels = triton.TritonRows(small_tiles)
    case = busy_case(vocab=60)
    rows, terms = protocol_arguments(kernels, case, 60)
    first, second = kernels.loss(rows, terms, None), kernels.loss(rows, terms, None)
    assert terms.ticket.item() == 0
    assert_close(first.sums, second.sums, rtol=0, atol=0)


def test_device_memory_of_the_rows_that_people_have():
    def traffic(width, chip=H200):
        plan = triton.launch_plan("loss", width, 2, True, False, chip)
        row = triton.row_traffic("loss", plan, width=width, vocab_size=width, itemsize=2)
        return row.device_memory / row.needed

    # The token's gradient is stored twice.
    assert traffic(8192) == pytest.approx(1.0, rel=1e-4)
    assert traffic(32_000) == pytest.approx(1.0, rel=1e-4)
    assert traffic(128_256) == pytest.approx(1.5, rel=1e-4)  # the rows in flight are more than the cache holds


# ---- weights, scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (3, 5000), (200, 3)])
def test_prepare_equals_plain_pytorch(shape, mode):
    mask = torch.rand(shape) < 0.7
    mask[0] = False
    ids = torch.arange(shape[1]).div(7, rounding_mode="floor")[None] if shape[0] == 1 else None
    strided = mask.t().contiguous().t()
    for normalizer in (None, 11.0, torch.tensor(7, dtype=torch.int64)):
        aggregation = Aggregation(mode, ids, 1 if ids is not None else shape[0], 600, normalizer, torch.tensor(0.3))
        values = (float("inf"), torch.tensor(0.1), torch.tensor(0.7, dtype=torch.float64))
        values += tuple(0.3 * i for i in range(len(COEFFICIENTS) - len(values)))
        own = triton.TritonRows().prepare(strided, aggregation, values)
        plain = fused.PlainHelpers().prepare(strided, aggregation, values)
        for name in own._fields:
            assert_close(getattr(own, name), getattr(plain, name), rtol=2e-7, atol=0, msg=name)


def test_packed_sequences_are_weighed_by_their_own_lengths():
    mask = torch.rand(1, 9000) < 0.5
    ids = torch.arange(9000)[None] // 1300
    aggregation = Aggregation("seq-mean-token-mean", ids, 7)
    zeros = (0.0,) * len(COEFFICIENTS)
    own, plain = (helper.prepare(mask, aggregation, zeros) for helper in (triton.TritonRows(), fused.PlainHelpers()))
    assert_close(own.weights, plain.weights, rtol=2e-7, atol=0)
    assert_close(own.extras, plain.extras)


# ---- who may have it -------------------------------------------------------------------------------------------------


def test_auto_never_takes_the_interpreter():
    assert ek.available_backends()["triton"] is None
    assert backends.choose_backend("auto", torch.device("cpu")).name != "triton"
    assert backends.choose_backend("triton", torch.device("cpu")).name == "triton"


@pytest.mark.parametrize(("hopper", "chosen"), [(True, "cuda"), (False, "triton")])
def test_auto_prefers_the_cuda_kernels_on_hopper_alone(monkeypatch, hopper, chosen):
    for name in ("cuda", "triton"):
        there = SimpleNamespace(
            name=name, dtypes=(torch.bfloat16,), device_types=("cuda",), why_unavailable=lambda: None
        )
        monkeypatch.setitem(backends._BACKENDS, name, there)
    monkeypatch.setattr(backends, "_is_hopper", lambda device: hopper)
    assert backends.choose_backend("auto", torch.device("cuda"), torch.bfloat16).name == chosen


def test_without_a_gpu_the_reason_names_the_cure():
    script = "import epo_kernels as ek; print(ek.available_backends()['triton'])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "no CUDA device" in told.stdout
    assert "TRITON_INTERPRET=1" in told.stdout


def test_without_triton_the_reason_names_the_cure(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here.*pip install"):
        run(busy_case(), "triton")


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="float64"):
        run(busy_case(dtype=torch.float64), "triton")
