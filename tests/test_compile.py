"""torch.compile over the loss: one graph, the same numbers, and one compilation under a schedule."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import epo_kernels as ek
from tests.cases import random_case, to_packed

SCHEDULED = ("entropy_coeff", "penalty_weight", "kl_coeff", "normalizer", "loss_scale", "temperature")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case_of(band_scope="token", penalty="hinge", mode="seq-mean-token-mean", **arguments):
    cfg = ek.EPOConfig(
        band_scope=band_scope, penalty=penalty, loss_agg_mode=mode, entropy_coeff=0.5, kl_coeff=0.1, penalty_alpha=0.7
    )
    return random_case(cfg, dtype=torch.float32, seed=4, **arguments)


def loss_of(case):
    """A function of the logits and of the scheduled scalars."""
    fixed = {name: value for name, value in case.items() if name != "logits"}

    def loss(logits, scalars):
        return ek.epo_loss(logits, **fixed, **scalars, backend="reference")

    return loss


def step(function, logits, scalars):
    logits = logits.clone().requires_grad_()
    out = function(logits, scalars)
    out.loss.backward()
    return out.loss.detach(), out.metrics.values, out.log_probs, out.entropy, logits.grad


def assert_steps_agree(compiled, eager):
    for a, b in zip(compiled, eager, strict=True):
        assert_close(a, b, rtol=2e-5, atol=2e-6, equal_nan=True)


CASES = {
    "token": lambda: case_of(),
    "segment": lambda: case_of("segment"),
    "bounds a segment": lambda: {
        **case_of("segment", "quadratic", segment_ids=torch.arange(15).reshape(3, 5) // 2),
        "entropy_bounds": (torch.full((8,), 1.0), torch.full((8,), 1.3)),
    },
    "packed": lambda: to_packed(case_of(), [5, 2, 3])[0],
    "packed segment": lambda: to_packed(case_of("segment", "gate"), [5, 2, 3])[0],
    "packed segment ids": lambda: to_packed(
        case_of("segment", segment_ids=torch.arange(15).reshape(3, 5) // 2, mode="token-mean"), [5, 2, 3]
    )[0],
}


def test_bad_bounds_make_a_compiled_loss_nan():
    case = case_of("segment")
    lower, upper = (bound.clone() for bound in case["entropy_bounds"])
    lower[0, 0] = upper[0, 0] + 1.0
    function = torch.compile(loss_of({**case, "entropy_bounds": (lower, upper)}), backend="eager", fullgraph=True)
    out = function(case["logits"], {})
    assert out.loss.isnan()
    assert out.metrics.invalid_tokens == case["mask"][0].sum()


@pytest.mark.parametrize("name", CASES)
def test_inductor_equals_eager(name):
    case = CASES[name]()
    function, scalars = loss_of(case), {"loss_scale": torch.tensor(2.0)}
    compiled = step(torch.compile(function, fullgraph=True), case["logits"], scalars)
    assert_steps_agree(compiled, step(function, case["logits"], scalars))


def test_a_bad_token_is_nan_and_counted_where_it_cannot_raise():
    case = case_of()
    case["tokens"][0, 0] = 99
    function = torch.compile(loss_of(case), fullgraph=True, backend="aot_eager")
    out = function(case["logits"], {})
    assert out.loss.isnan()
    assert out.metrics.invalid_tokens == 1


def schedule(index):
    values = (0.5 / (index + 1), 1.0 + 0.9**index, 0.1 + index, 10.0 + index, 1 / (1 + index), 1.05 + index / 20)
    return dict(zip(SCHEDULED, values, strict=True))


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("kind", ["tensors", "numbers", "numbers, dynamic=True"])
def test_twenty_steps_of_a_schedule_compile_once(kind, band_scope):
    case, counter = case_of(band_scope), CompileCounter()
    eager = loss_of(case)
    compiled = torch.compile(eager, fullgraph=True, backend=counter, dynamic=True if "dynamic" in kind else None)
    for index in range(20):
        scalars = schedule(index)
        if kind == "tensors":
            scalars = {name: torch.tensor(value) for name, value in scalars.items()}
        assert_steps_agree(step(compiled, case["logits"], scalars), step(eager, case["logits"], scalars))
    # Dynamo makes any number a constant at first, and a variable when it sees a second value; never again after that.
    assert counter.frame_count == (2 if kind == "numbers" else 1)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_segment_ids", [False, True])
def test_batches_of_changing_shape_compile_once_more_at_most(with_segment_ids, packed, dynamic):
    counter = CompileCounter()

    def loss(arguments):
        return ek.epo_loss(**arguments, vocab_size=6, backend="reference").loss

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch, time in ((3, 5), (4, 6), (5, 9), (2, 3)):
        case = case_of("segment", batch=batch, time=time)
        case["tokens"].clamp_(max=5)
        if with_segment_ids:
            case["segment_ids"] = torch.arange(batch * time).reshape(batch, time) // 4
        if packed:
            case, _ = to_packed(case, [time] * batch)
        assert_close(compiled(case), loss(case))
    assert counter.frame_count == (1 if dynamic else 2)


def test_log_probs_and_entropy_compile():
    case = case_of()

    def both(logits):
        return ek.log_probs_and_entropy(logits, case["tokens"], temperature=0.7, backend="reference")

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(case["logits"])
    for a, b in zip(got, both(case["logits"]), strict=True):
        assert_close(a, b)
