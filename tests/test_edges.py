"""The edges of the maths: masked tokens, coefficients of zero, low precision."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from tests import plain
from tests.cases import MODES, PENALTIES, assert_identical, metrics_of, random_case, run

F64 = {"dtype": torch.float64}
INF = math.inf

# ---- masked tokens are never read -----------------------------------------------------------------------------------

FLOAT_POISON = [math.nan, INF, -INF, 1e38, -100.0]


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_poison_in_masked_tokens_changes_no_bit(penalty, band_scope):
    cfg = ek.EPOConfig(
        penalty=penalty, band_scope=band_scope, entropy_coeff=0.5, kl_coeff=0.2, loss_agg_mode="seq-mean-token-mean"
    )
    turns = torch.arange(5).expand(3, 5) // 2
    clean = random_case(
        cfg, dtype=torch.float32, is_weights=torch.rand(3, 5), temperature=1 + torch.rand(3, 5), segment_ids=turns
    )
    masked = ~clean["mask"]
    expected = run(clean)
    assert not expected[1][masked].any()
    assert not expected[0].log_probs[masked].any()
    assert not expected[0].entropy[masked].any()

    def poisoned(value, poison):
        return value.clone().index_put((masked,), torch.tensor(poison, dtype=value.dtype))

    for name in ("logits", "old_log_probs", "advantages", "ref_log_probs", "is_weights", "temperature"):
        for poison in FLOAT_POISON:
            assert_identical(run({**clean, name: poisoned(clean[name], poison)}), expected)
    for poison in (-100, -1, 7, 2**40, -(2**62)):
        assert_identical(run({**clean, "tokens": poisoned(clean["tokens"], poison)}), expected)
        assert_identical(run({**clean, "segment_ids": poisoned(turns.contiguous(), poison)}), expected)
    if penalty != "none":
        lower, upper = clean["entropy_bounds"]
        for poison in FLOAT_POISON:
            assert_identical(run({**clean, "entropy_bounds": (poisoned(lower, poison), upper)}), expected)
            assert_identical(run({**clean, "entropy_bounds": (lower, poisoned(upper, poison))}), expected)


@pytest.mark.parametrize("penalty", PENALTIES[1:])
def test_poison_for_an_empty_sequence_or_segment_changes_no_bit(penalty):
    cfg = ek.EPOConfig(penalty=penalty, band_scope="segment", entropy_coeff=0.5)
    segments = torch.arange(1, 4)[:, None].expand(3, 5)  # 0 and 4 have no token, 3 none that counts
    bounds = (torch.full((5,), 0.5), torch.full((5,), 0.9))
    case = random_case(cfg, dtype=torch.float32, entropy_bounds=bounds, segment_ids=segments, advantages=torch.randn(3))
    expected = run(case)
    lower, upper, advantages = bounds[0].clone(), bounds[1].clone(), case["advantages"].clone()
    lower[[0, 3, 4]], upper[[0, 3, 4]], advantages[2] = math.nan, math.nan, math.nan
    assert_identical(run({**case, "entropy_bounds": (lower, upper), "advantages": advantages}), expected)


def test_no_token_at_all_is_a_loss_of_exactly_zero():
    for mode, scope in product(MODES, ["token", "segment"]):
        cfg = ek.EPOConfig(penalty="quadratic", band_scope=scope, loss_agg_mode=mode, kl_coeff=0.1)
        case = random_case(cfg, mask=torch.zeros(3, 5))
        for name in ("logits", "old_log_probs", "advantages", "ref_log_probs"):
            case[name] = case[name] * math.nan
        case["entropy_bounds"] = (case["advantages"], case["advantages"])
        for normalizer in (None, 0.0, 5):
            out, gradient = run({**case, "normalizer": normalizer})
            assert out.loss == 0
            assert not gradient.any()
            assert not out.metrics.values.any()


# ---- coefficients of zero, and as tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_tensor_coefficients_equal_numbers(penalty, band_scope):
    cfg = ek.EPOConfig(penalty=penalty, band_scope=band_scope, kl_coeff=0.2, kl_type="k2")
    values = {"entropy_coeff": 0.3, "penalty_weight": 1.5, "kl_coeff": 0.7, "normalizer": 9.0, "loss_scale": 2.0}
    case = random_case(cfg)
    numbers = run({**case, **values})
    for dtype in (torch.float64, torch.float32):
        tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
        tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
        out, gradient = run({**case, **tensors})
        assert_close(out.loss, numbers[0].loss, **tolerance)
        assert_close(gradient, numbers[1], **tolerance)
        assert_close(out.metrics.values, numbers[0].metrics.values, **tolerance)


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", ["hinge", "quadratic", "indicator"])
@pytest.mark.parametrize("name", ["entropy_coeff", "penalty_weight"])
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_coefficient_of_zero_skips_an_infinite_term(penalty, band_scope, name, zero):
    bare = random_case(ek.EPOConfig(entropy_coeff=0.5), **({name: zero} if name == "entropy_coeff" else {}))
    out, gradient = run(bare)
    infinite = (torch.full((3, 5), INF, **F64), torch.full((3, 5), INF, **F64))
    cfg = ek.EPOConfig(penalty=penalty, band_scope=band_scope, entropy_coeff=0.5)
    skipped = run({**bare, "cfg": cfg, "entropy_bounds": infinite, name: zero})
    assert_close(skipped[0].loss, out.loss, rtol=0, atol=0)
    assert_close(skipped[1], gradient, rtol=0, atol=0)
    assert skipped[0].metrics.nonfinite_tokens == 0


def test_scalars_are_never_differentiated():
    names = ("entropy_coeff", "penalty_weight", "temperature")
    scalars = {name: torch.tensor(0.5, requires_grad=True) for name in names}
    case = random_case(ek.EPOConfig(penalty="hinge"), **scalars)
    others = [case[name].requires_grad_() for name in ("old_log_probs", "advantages")]
    logits = case["logits"].requires_grad_()
    out = ek.epo_loss(**case, backend="reference")
    out.loss.backward()
    assert logits.grad is not None
    assert all(value.grad is None for value in [*scalars.values(), *others])
    assert not any(value.requires_grad for value in (out.log_probs, out.entropy, out.metrics.values))


# ---- low precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_have_float32_statistics(dtype):
    cfg = ek.EPOConfig(penalty="hinge", kl_coeff=0.1, entropy_coeff=0.5)
    out, gradient, expected = assert_equals_plain_within(random_case(cfg, dtype=dtype), dtype)
    assert out.loss.dtype == out.log_probs.dtype == out.entropy.dtype == torch.float32
    assert gradient.dtype == dtype
    assert expected.metrics["tokens"] == metrics_of(out)["tokens"]


def assert_equals_plain_within(case, dtype):
    """Statistics to float32, the gradient to a rounding of the logits' dtype."""
    out, gradient = run(case)
    expected = plain.epo_loss(**case)
    assert_close(out.loss.item(), expected.loss, rtol=1e-5, atol=1e-6)
    assert_close(out.log_probs.double(), expected.log_probs, rtol=1e-5, atol=1e-6)
    assert_close(out.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-6)
    assert_close(gradient.double(), expected.gradient, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-6)
    return out, gradient, expected


def test_float64_logits_are_computed_in_float64_throughout():
    out, gradient = run(random_case(ek.EPOConfig(penalty="indicator", penalty_alpha=0.1, loss_agg_mode=MODES[3])))
    assert out.loss.dtype == out.log_probs.dtype == out.entropy.dtype == gradient.dtype == torch.float64
