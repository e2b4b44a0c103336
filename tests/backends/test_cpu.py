"""The CPU kernels: the matrix of every backend, and tests specific to them."""

import os
import threading
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.backends.cpu import CpuRows
from epo_kernels.backends.native import native
from epo_kernels.declaration import COEFFICIENTS
from epo_kernels.fused.rows import Rows, Terms
from epo_kernels.inputs import LogitTransform, TokenInputs
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import DTYPES, BackendMatrix, assert_no_worse, busy_case
from tests.cases import assert_identical, run

INSTRUCTIONS = native().cpu_instructions()


class TestCpu(BackendMatrix, AutogradMatrix):
    backend = "cpu"


def test_the_native_module_is_built_and_the_default():
    assert ek.available_backends()["cpu"] is None
    case = busy_case(vocab=100)
    assert_identical(run(case, "auto"), run(case, "cpu"))
    assert ek.backends.choose_backend("auto", torch.device("cpu"), torch.float64).name == "reference"
    with pytest.raises(RuntimeError, match=r"backend='cpu' supports logits of torch.float32.*got torch.float64"):
        run({**case, "logits": case["logits"].double()}, "cpu")


@pytest.fixture
def rows():
    """128 rows of a wide vocabulary, their terms, and room for a gradient."""

    def make(dtype=torch.float32, count=128, vocab=20_011):
        logits = (4 * torch.randn(1, count, vocab)).to(dtype)
        tokens, mask = torch.randint(vocab, (1, count)), torch.rand(1, count) < 0.9
        given = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "entropy_coeff": 0.01}
        coefficients = torch.tensor([given.get(name, 0.0) for name in COEFFICIENTS])
        values = [torch.where(mask, torch.randn(1, count), 0) for _ in range(3)]
        terms = Terms(
            *values[:2],
            old_log_probs=values[2] - 10,
            ref_log_probs=None,
            is_weights=None,
            lower=None,
            upper=None,
            coefficients=coefficients,
            ticket=torch.zeros(1, dtype=torch.int32),
            policy_loss="ppo",
            penalty="none",
            kl_type="k3",
        )
        return Rows(logits, tokens, mask, LogitTransform(vocab, 1.0, None, None)), terms

    return make


def all_of(kernels, rows, terms):
    """Everything that the kernels compute from the rows."""
    out, other = torch.full_like(rows.logits, torch.nan), torch.full_like(rows.logits, torch.nan)
    loss = kernels.loss(rows, terms, out)
    statistics = kernels.statistics(rows, entropy=True)
    kernels.gradient(rows, statistics, terms.weights, terms.advantages, other)
    return [out, other, *loss, *statistics]


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_nan_is_nan_whatever_its_bits(rows, instructions, softcap):
    """GPUs make NaN of all bits; the sum of its bits and an exponent's would be a number."""
    given, terms = rows(count=2, vocab=64)
    given = replace(given, transform=LogitTransform(64, 1.0, softcap, None), mask=torch.ones(1, 2, dtype=torch.bool))
    given.logits[0, 0, 11] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    given.tokens[:] = 5
    loss = CpuRows(instructions).loss(given, terms, torch.empty_like(given.logits))
    for values in (loss.log_probs, loss.entropy):
        assert values[0].isnan().tolist() == [True, False]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_every_instruction_set_is_as_accurate_as_eager(rows, instructions, dtype, softcap):
    given, terms = rows(dtype, count=6, vocab=33_003)
    given = Rows(given.logits, given.tokens, given.mask, LogitTransform(33_000, 1.3, softcap, 0.9))
    given.tokens.clamp_(max=32_999)

    def eager(logits):
        leaf = logits.detach().requires_grad_()
        tokens = TokenInputs(given.mask.shape, given.transform, given.tokens, given.mask, None)
        log_probs, entropy = ek.reference.masked_log_probs_and_entropy(leaf, tokens)
        total = (log_probs * terms.weights + entropy * terms.advantages).sum()
        return log_probs, entropy, torch.autograd.grad(total, leaf)[0]

    kernels = CpuRows(instructions)
    statistics = kernels.statistics(given, entropy=True)
    gradient = torch.empty_like(given.logits)
    kernels.gradient(given, statistics, terms.weights, terms.advantages, gradient)
    fused = (statistics.log_probs, statistics.entropy, gradient)
    truth, others = eager(given.logits.double()), eager(given.logits)
    for name, a, b, c in zip(("log-probs", "entropy", "gradient"), fused, others, truth, strict=True):
        eps = torch.finfo(dtype if name == "gradient" else torch.float32).eps
        assert_no_worse(name, a, b, c, eps * c.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_number_of_threads(rows, threads, dtype):
    for given, terms in (rows(dtype), rows(dtype, count=3000, vocab=65)):
        threads(1)
        expected = all_of(CpuRows(), given, terms)
        for count in (2, 3, 8):
            threads(count)
            for a, b in zip(all_of(CpuRows(), given, terms), expected, strict=True):
                assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_in_place_equals_out_of_place(rows):
    given, terms = rows()
    out = torch.empty_like(given.logits)
    CpuRows().loss(given, terms, out)
    CpuRows().loss(given, terms, given.logits)
    assert_close(given.logits, out, rtol=0, atol=0)


def test_a_gradient_written_past_the_caches_is_the_same(rows):
    """Above 16 MB stores bypass the caches; an odd offset makes them unaligned at either end of a row."""
    given, terms = rows(count=300)
    memory = torch.full((given.logits.numel() + 1,), torch.nan)
    out = memory[1:].view_as(given.logits)
    CpuRows().loss(given, terms, out)
    for start in range(0, 300, 60):
        part = slice(start, start + 60)
        few = Rows(given.logits[:, part], given.tokens[:, part], given.mask[:, part], given.transform)
        cut = {"weights": terms.weights, "advantages": terms.advantages, "old_log_probs": terms.old_log_probs}
        cut = {name: value[:, part] for name, value in cut.items()}
        expected = torch.empty_like(few.logits)
        CpuRows().loss(few, Terms(**{**vars(terms), **cut}), expected)
        assert_close(out[:, part], expected, rtol=0, atol=0)


def test_a_vocabulary_of_a_million():
    case = busy_case(vocab=1 << 20, batch=1, time=2)
    TestCpu().check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_a_gradient(dtype):
    values = torch.randn(100_003).to(dtype)
    for view in (values.clone(), values.clone().view(-1)[::3]):
        expected = (view.float() * 0.3).to(dtype)
        CpuRows().scale(view, torch.tensor(0.3), view)
        assert_close(view, expected, rtol=0, atol=0)


def test_callers_side_by_side_get_their_own_results(rows, threads):
    threads(2)
    given, terms = rows(count=40)
    expected = all_of(CpuRows(), given, terms)
    wrong = []

    def work():
        for _ in range(5):
            for a, b in zip(all_of(CpuRows(), given, terms), expected, strict=True):
                if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                    wrong.append(a)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own(rows, threads):
    threads(2)
    given, terms = rows(count=40)
    kernels, out = CpuRows(), torch.empty_like(given.logits)
    expected = kernels.loss(given, terms, out).log_probs  # the pool's threads now exist, but not in the child
    results = [torch.empty_like(expected) for _ in range(3)]
    child = os.fork()
    if child == 0:
        # No PyTorch kernels here: PyTorch's own OpenMP pool does not survive a fork.
        loss = kernels.loss(given, terms, out)
        os._exit(0 if loss.log_probs.tolist() == expected.tolist() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert results


@pytest.mark.parametrize("shape", [(2, 0, 1), (0, 3, 5)])
def test_an_empty_batch_of_any_strides(shape):
    """Transposed, it has strides of 0, which normally means that elements share memory."""
    logits = torch.zeros(shape).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    log_probs, entropy = ek.log_probs_and_entropy(logits, torch.zeros(shape[:2], dtype=torch.int64), backend="cpu")
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape
