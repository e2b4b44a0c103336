"""The maths, term by term: numbers computed by hand, and the loss in plain Python."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels import reference
from tests.cases import MODES, PENALTIES, assert_equals_plain, assert_identical, random_case, run

F64 = {"dtype": torch.float64}
LN2 = math.log(2.0)
INF = math.inf


def statistics(rows, tokens, **kwargs):
    """log_probs and entropy of packed rows given as lists."""
    rows = torch.tensor(rows, **F64) if isinstance(rows, list) else rows
    return ek.log_probs_and_entropy(rows, torch.tensor(tokens), backend="reference", **kwargs)


def slope(function, at):
    """(value, derivative) of an elementwise function at one number."""
    x = torch.tensor(at, **F64, requires_grad=True)
    value = function(x)
    (derivative,) = torch.autograd.grad(value, x, allow_unused=True) if value.requires_grad else (None,)
    return value.item(), 0.0 if derivative is None else derivative.item()


# ---- log-prob and entropy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "token", "log_prob", "entropy"),
    [
        ([0.0, -LN2, -LN2], 0, -LN2, 1.5 * LN2),  # p = 1/2, 1/4, 1/4
        ([0.0, -LN2, -LN2], 2, -2 * LN2, 1.5 * LN2),
        ([5.0, 5.0], 1, -LN2, LN2),
        ([0.0, -INF, 0.0], 2, -LN2, LN2),  # a possibility that is none adds exactly 0
        ([-INF, -INF, 7.0], 2, 0.0, 0.0),
        ([7.0], 0, 0.0, 0.0),
        ([-1e4, -1e4, -1e4, -1e4], 3, -2 * LN2, 2 * LN2),  # a maximum that starts at 0 would underflow
        ([1e300, 0.0], 0, 0.0, 0.0),
        ([1e300, 0.0], 1, -1e300, 0.0),
    ],
)
def test_log_prob_and_entropy_by_hand(row, token, log_prob, entropy):
    log_probs, entropies = statistics([row], [token])
    assert_close(log_probs.item(), log_prob, rtol=1e-14, atol=1e-15)
    assert_close(entropies.item(), entropy, rtol=1e-14, atol=1e-15)


def test_gradient_is_the_formula_in_a_and_b():
    z = torch.randn(4, 6, **F64, requires_grad=True)
    tokens, a, b, tau = torch.tensor([0, 5, 2, 2]), torch.randn(4, **F64), torch.randn(4, **F64), 0.7
    log_probs, entropy = statistics(z, tokens.tolist(), temperature=tau)
    (gradient,) = torch.autograd.grad((a * log_probs + b * entropy).sum(), z)
    p = (z.detach() / tau).softmax(-1)
    h = -(p * p.log()).sum(-1, keepdim=True)
    onehot = torch.eye(6, **F64)[tokens]
    expected = (a[:, None] * (onehot - p) - b[:, None] * p * (p.log() + h)) / tau
    assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_offset_that_the_dtype_represents_changes_no_bit(dtype):
    offset = {torch.float32: 2.0**15, torch.bfloat16: 32.0, torch.float16: 512.0}[dtype]
    step = {torch.float32: 2.0**-8, torch.bfloat16: 0.25, torch.float16: 0.5}[dtype]
    rows = torch.randint(-16, 17, (5, 9)) * step
    assert torch.equal((rows + offset).to(dtype).double(), rows.double() + offset)
    case = random_case(batch=1, time=5, vocab=9, dtype=dtype)
    case = {**case, "mask": torch.ones(1, 5, dtype=torch.bool), "logits": rows[None].to(dtype)}
    assert_identical(run(case), run({**case, "logits": (rows[None] + offset).to(dtype)}))


def test_probabilities_sum_to_one_far_from_zero():
    # At an offset of 3e4, a rounded lse is off by up to 1e-3, and so would be the sum.
    row = torch.randn(1, 300) * 3 + 3e4
    log_probs, _ = statistics(row.expand(300, 300), list(range(300)))
    assert abs(log_probs.double().exp().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("at", [slice(0, 64), slice(64, 128), slice(1, 128)])
def test_whole_blocks_of_minus_inf_are_harmless(at):
    case = random_case(vocab=128, cfg=ek.EPOConfig(entropy_coeff=0.5), batch=1, time=3)
    case["logits"][..., at] = -INF
    token = 0 if at.start else 127
    out, gradient, _ = assert_equals_plain({**case, "tokens": torch.full((1, 3), token)})
    assert torch.isfinite(out.loss)
    assert not gradient[..., at].any()


@pytest.mark.parametrize("poison", [-INF, INF, math.nan])
def test_a_row_that_is_no_distribution_makes_the_loss_nan_and_is_counted(poison):
    case = random_case(cfg=ek.EPOConfig(entropy_coeff=0.5), mask=torch.ones(3, 5, dtype=torch.bool))
    if poison == -INF:
        case["logits"][1, 2] = poison
    else:
        case["logits"][1, 2, 3] = poison
    case["tokens"][1, 2] = 0
    out, gradient = run(case)
    assert out.loss.isnan()
    assert (out.metrics.nonfinite_tokens, out.metrics.invalid_tokens) == (1, 0)
    assert out.entropy[1, 2].isnan()
    assert gradient[1, 2].isnan().all()
    assert gradient.isnan().sum() == 7  # no other row


@pytest.mark.parametrize("kl_coeff", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_minus_inf_at_the_sampled_token_clamps_the_ratio(kl_coeff):
    case = random_case(cfg=ek.EPOConfig(entropy_coeff=0.0), batch=1, time=1, kl_coeff=kl_coeff)
    case["logits"][0, 0, 3] = -INF
    case |= {"tokens": torch.tensor([[3]]), "advantages": torch.ones(1, 1, **F64)}
    for kl_type in ("k1", "k2", "k3", "abs"):
        cfg = ek.EPOConfig(entropy_coeff=0.0, kl_type=kl_type)
        out, gradient = run({**case, "cfg": cfg, "ref_log_probs": torch.full((1, 1), -1.0, **F64)})
        assert_close(out.loss.item(), -math.exp(-20.0), rtol=1e-14, atol=0)
        assert not gradient.any()
        assert out.log_probs.item() == -INF


def test_minus_inf_at_the_sampled_token_on_policy_is_nan_and_counted():
    case = random_case(batch=1, time=1, old_log_probs=None)
    case["logits"][0, 0, 3] = -INF
    out, _ = run({**case, "tokens": torch.tensor([[3]])})
    assert out.loss.isnan()
    assert out.metrics.nonfinite_tokens == 1


# ---- the whole loss against plain Python ----------------------------------------------------------------------------


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_combination_equals_plain_python(penalty, band_scope):
    for seed, (mode, kl_type, c) in enumerate(product(MODES, ["k1", "k2", "k3", "abs"], [None, 1.5])):
        cfg = ek.EPOConfig(
            clip_ratio_low=0.3,
            clip_ratio_high=0.4,
            clip_ratio_c=c,
            entropy_coeff=0.5,
            kl_coeff=0.3,
            kl_type=kl_type,
            penalty=penalty,
            penalty_alpha=0.7,
            smooth_coeff=1.3,
            band_scope=band_scope,
            loss_agg_mode=mode,
            temperature=0.8,
        )
        assert_equals_plain(random_case(cfg, seed=seed, penalty_weight=1.7, loss_scale=3.0))


@pytest.mark.parametrize("seed", range(3))
def test_transforms_equal_plain_python(seed):
    cfg = ek.EPOConfig(entropy_coeff=0.5, kl_coeff=0.3, penalty="quadratic", band_scope="segment")
    tau = 0.5 + torch.rand(3, 5, **F64)
    for arguments in (
        {"logit_softcap": 1.5},
        {"logit_scale": 0.3},
        {"logit_scale": -2.0, "logit_softcap": 3.0},
        {"temperature": 2},
        {"temperature": torch.tensor(0.5)},
        {"temperature": tau},
        {"temperature": tau[:, 0]},
        {"vocab_size": 6},
        {"vocab_size": 5, "temperature": tau, "logit_softcap": 2.0, "logit_scale": 1.7},
    ):
        case = random_case(cfg, seed=seed, **arguments)
        case["tokens"].clamp_(max=4)
        assert_equals_plain(case)


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e30, 0.0])
def test_the_tail_of_a_padded_head_contributes_nothing(garbage):
    case = random_case(ek.EPOConfig(entropy_coeff=0.5))
    tail = torch.full((3, 5, 4), garbage, **F64)
    padded = {**case, "logits": torch.cat([case["logits"], tail], dim=-1), "vocab_size": 7}
    whole, part = run(case), run(padded)
    assert not part[1][..., 7:].any()
    assert_identical(whole, (part[0], part[1][..., :7]))


# ---- clipping -------------------------------------------------------------------------------------------------------


def policy_loss(advantage, low=0.2, high=0.3, c=3.0):
    cfg = ek.EPOConfig(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=c)

    def pg(log_ratio):
        old, advantages = torch.zeros((), **F64), torch.tensor(advantage, **F64)
        return reference.policy_loss(reference.PolicyInputs(log_ratio, old, advantages, None, None), cfg).pg

    return pg


@pytest.mark.parametrize(
    ("advantage", "ratio", "pg", "slope_of_pg"),
    [
        (2.0, 1.1, -2.2, -2.2),  # inside
        (2.0, 0.5, -1.0, -1.0),  # A > 0 never clips below
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1.3
        (-2.0, 0.5, 1.6, 0.0),  # clipped at 0.8
        (-2.0, 1.5, 3.0, 3.0),  # A < 0 never clips above ...
        (-2.0, 2.9, 5.8, 5.8),
        (-2.0, 4.0, 6.0, 0.0),  # ... but for the dual clip
        (0.0, 4.0, 0.0, 0.0),
    ],
)
def test_clip_and_dual_clip_by_hand(advantage, ratio, pg, slope_of_pg):
    value, derivative = slope(policy_loss(advantage), math.log(ratio))
    assert_close((value, derivative), (pg, slope_of_pg), rtol=1e-14, atol=1e-14)


def test_no_dual_clip_leaves_the_loss_unbounded():
    value, derivative = slope(policy_loss(-2.0, c=None), math.log(40.0))
    assert_close((value, derivative), (80.0, 80.0), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "end"), [(2.0, 0.25, "high"), (-2.0, -0.25, "low"), (-2.0, 1.0, "c")]
)
def test_ties_have_the_whole_gradient_of_the_ratio(advantage, log_ratio, end):
    ratio = torch.tensor(log_ratio, **F64).exp().item()
    width = {"high": ratio - 1, "low": 1 - ratio, "c": ratio}[end]  # exact differences: the tie is a tie in float64
    tied, unclipped = policy_loss(advantage, **{end: width}), -advantage * ratio
    assert slope(tied, log_ratio) == (unclipped, unclipped)
    beyond = math.nextafter(log_ratio, INF if log_ratio > 0 else -INF)
    beyond += 4 * (beyond - log_ratio)
    assert slope(tied, beyond) == (unclipped, 0.0)


def test_on_policy_the_ratio_is_one_with_its_gradient_even_at_a_clip_of_zero():
    case = random_case(ek.EPOConfig(clip_ratio_low=0, clip_ratio_high=0, entropy_coeff=0), old_log_probs=None)
    out, gradient, expected = assert_equals_plain(case)
    weighted = case["advantages"][case["mask"]] / case["mask"].sum()
    assert_close(out.loss, -weighted.sum())
    assert_close(torch.tensor(expected.a, **F64).reshape(3, 5)[case["mask"]], -weighted)
    assert (out.metrics.ratio_sum, out.metrics.ppo_kl_sum) == (case["mask"].sum(), 0)
    assert gradient.abs().sum() > 0


def test_on_policy_equals_old_log_probs_of_the_same_policy():
    case = random_case(ek.EPOConfig(entropy_coeff=0.1), old_log_probs=None, dtype=torch.float32)
    out, gradient = run(case)
    assert_identical((out, gradient), run({**case, "old_log_probs": out.log_probs}))


@pytest.mark.parametrize(
    ("advantage", "difference", "pg", "derivative"),
    [
        (1.0, 200.0, -1.3, 0.0),
        (-1.0, 200.0, 3.0, 0.0),
        (1.0, -200.0, -math.exp(-20), 0.0),  # outside [-20, 20] the exponent has no gradient
        (-1.0, -200.0, 0.8, 0.0),
        (1.0, -20.0, -math.exp(-20), -math.exp(-20)),
        (1.0, math.nextafter(-20.0, -INF), -math.exp(-20), 0.0),
    ],
)
def test_log_ratios_far_away(advantage, difference, pg, derivative):
    assert_close(slope(policy_loss(advantage), difference), (pg, derivative), rtol=1e-14, atol=0)


def test_log_ratio_of_exactly_twenty_passes_its_gradient():
    assert_close(slope(policy_loss(-1.0, c=None), 20.0), (math.exp(20), math.exp(20)), rtol=1e-14, atol=0)
    assert_close(slope(policy_loss(-1.0, c=None), 20.001), (math.exp(20), 0.0), rtol=1e-14, atol=0)


def test_log_ratios_of_200_stay_finite_in_float32():
    case = random_case(ek.EPOConfig(clip_ratio_c=None), dtype=torch.float32)
    for shift in (-200.0, 200.0):
        shifted = {**case, "old_log_probs": case["old_log_probs"] + shift}
        out, gradient, _ = assert_equals_plain(shifted, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(gradient).all()


# ---- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_type", "difference", "value", "derivative"),
    [
        ("k1", 0.5, 0.5, 1.0),
        ("k1", -200.0, -200.0, 1.0),
        ("abs", 0.5, 0.5, 1.0),
        ("abs", -0.5, 0.5, -1.0),
        ("abs", 0.0, 0.0, 0.0),
        ("k2", -3.0, 4.5, -3.0),
        ("k3", 0.0, 0.0, 0.0),
        ("k3", LN2, LN2 - 0.5, 0.5),  # e^-d + d - 1 and 1 - e^-d
        ("k3", -1.0, math.e - 2.0, 1.0 - math.e),
        ("k3", -2.6, math.exp(2.6) - 3.6, 1.0 - math.exp(2.6)),  # 9.86: not clamped yet
        ("k3", 5.0, math.exp(-5.0) + 4.0, 1.0 - math.exp(-5.0)),
        ("k3", 11.5, 10.0, 0.0),  # clamped to 10: no gradient
        ("k3", 200.0, 10.0, 0.0),
        ("k3", -200.0, 10.0, 0.0),
        ("k3", -1000.0, 10.0, 0.0),  # e^1000 is infinite: only its exponent's clamp keeps 0 * inf out of the gradient
    ],
)
def test_kl_estimators_by_hand(kl_type, difference, value, derivative):
    ref = torch.tensor(-1.25, **F64)
    got = slope(lambda log_prob: reference.kl_penalty(log_prob, ref, kl_type), difference - 1.25)
    assert_close(got, (value, derivative), rtol=1e-13, atol=1e-13)


def test_kl_of_zero_coefficient_never_multiplies_an_infinite_reference():
    for kl_type, zero in product(["k1", "k2", "k3", "abs"], [0, 0.0, torch.tensor(0.0), torch.tensor(0)]):
        case = random_case(ek.EPOConfig(kl_type=kl_type))
        bare = run(case)
        case["ref_log_probs"] = torch.full((3, 5), -INF, **F64)
        out, gradient = run({**case, "kl_coeff": zero})
        assert_close(out.loss, bare[0].loss, rtol=0, atol=0)
        assert_close(gradient, bare[1], rtol=0, atol=0)


# ---- the band -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "entropy", "value", "derivative"),
    [
        ("hinge", 0.5, 0.05, -0.1),  # band (1, 2), α = 0.1
        ("hinge", 1.0, 0.0, 0.0),
        ("hinge", 1.5, 0.0, 0.0),
        ("hinge", 2.0, 0.0, 0.0),
        ("hinge", 2.25, 0.025, 0.1),
        ("quadratic", 0.5, 0.025, -0.1),
        ("quadratic", 1.0, 0.0, 0.0),
        ("quadratic", 2.0, 0.0, 0.0),
        ("quadratic", 4.0, 0.4, 0.4),
        ("indicator", 0.5, 0.1, 0.0),
        ("indicator", 1.0, 0.1, 0.0),  # the bound itself is outside
        ("indicator", 1.0 + 1e-12, 0.0, 0.0),
        ("indicator", 2.0, 0.1, 0.0),
        ("indicator", 9.0, 0.1, 0.0),
        ("none", 9.0, 0.0, 0.0),
        ("gate", 9.0, 0.0, 0.0),
    ],
)
def test_penalties_by_hand(penalty, entropy, value, derivative):
    lower, upper = torch.tensor(1.0, **F64), torch.tensor(2.0, **F64)
    got = slope(lambda h: reference.band_penalty(h, lower, upper, penalty, 0.1), entropy)
    assert_close(got, (value, derivative), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("penalty", "value"), [("hinge", 0.1), ("quadratic", 0.05), ("indicator", 0.1)])
def test_a_band_upside_down_is_left_on_both_sides(penalty, value):
    lower, upper = torch.tensor(2.0, **F64), torch.tensor(1.0, **F64)  # H = 1.5: d_lo = d_hi = 1/2
    got = slope(lambda h: reference.band_penalty(h, lower, upper, penalty, 0.1), 1.5)
    assert_close(got, (value, 0.0), rtol=1e-13, atol=1e-15)


def one_token_slope(penalty, lower, upper, **arguments):
    """(loss, ∂loss/∂H) of one token whose policy loss is 0 and whose H is about 1.06, with λ = 1."""
    z = torch.tensor([[[0.5, -0.5, 0.2, 1.0]]], requires_grad=True)
    entropy = ek.log_probs_and_entropy(z, torch.tensor([[0]]), backend="reference")[1]
    bounds = [torch.full((1, 1), h) if isinstance(h, float) else entropy.detach() for h in (lower, upper)]
    cfg = ek.EPOConfig(penalty=penalty, penalty_alpha=0.25, entropy_coeff=1.0)
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1)
    out = ek.epo_loss(
        z, torch.tensor([[0]]), None, zeros, mask, cfg, entropy_bounds=tuple(bounds), backend="reference", **arguments
    )
    (whole,) = torch.autograd.grad(out.loss, z)
    (per_nat,) = torch.autograd.grad(entropy, z)
    b = (whole * per_nat).sum() / (per_nat * per_nat).sum()
    assert_close(whole, b * per_nat, rtol=1e-5, atol=1e-7)
    return out.loss.item(), b.item(), entropy.item(), out.metrics


@pytest.mark.parametrize(
    ("penalty", "lower", "upper", "penalty_value", "b", "below", "above"),
    [
        ("hinge", "H", 9.0, 0.0, -1.0, 0, 0),  # exactly at the bound: nothing
        ("hinge", 0.0, "H", 0.0, -1.0, 0, 0),
        ("quadratic", "H", "H", 0.0, -1.0, 0, 0),
        ("indicator", "H", 9.0, 0.25, -1.0, 0, 0),  # at the bound: outside, a constant
        ("indicator", 0.0, "H", 0.25, -1.0, 0, 0),
        ("gate", "H", 9.0, 0.0, -0.25, 0, 0),
        ("gate", 0.0, 9.0, 0.0, -1.0, 0, 0),
        ("gate", 3.0, 9.0, 0.0, -0.25, 1, 0),
        ("hinge", 0.0, 0.5, None, -1.0 + 0.25, 0, 1),
        ("hinge", 3.0, 9.0, None, -1.0 - 0.25, 1, 0),
        ("hinge", -INF, INF, 0.0, -1.0, 0, 0),  # nothing known: no penalty and no 0 * inf
        ("quadratic", -INF, INF, 0.0, -1.0, 0, 0),
        ("indicator", -INF, INF, 0.0, -1.0, 0, 0),
        ("gate", -INF, INF, 0.0, -1.0, 0, 0),
        ("quadratic", 0.0, INF, 0.0, -1.0, 0, 0),
    ],
)
def test_value_and_gradient_in_at_and_outside_the_band(penalty, lower, upper, penalty_value, b, below, above):
    loss, got_b, entropy, metrics = one_token_slope(penalty, lower, upper)
    if penalty_value is None:
        penalty_value = 0.25 * (entropy - upper if above else lower - entropy)
    assert_close(got_b, b, rtol=1e-5, atol=1e-6)
    assert_close(metrics.penalty.item(), penalty_value, rtol=1e-5, atol=1e-7)
    gate = -b if penalty == "gate" else 1.0
    assert_close(loss, -(gate * entropy - penalty_value), rtol=1e-5, atol=1e-6)
    assert (metrics.below_band_tokens, metrics.above_band_tokens) == (below, above)


def test_segment_gradient_is_spread_by_hand():
    # Two segments in one row, seq-mean-token-mean over B = 1, n = 4: w = 1/4. Segment 0 has tokens 0, 1, 3 (W = 3/4).
    z = torch.randn(1, 5, 6, **F64, requires_grad=True)
    mask, segments = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 0, -7]])
    tokens, zeros = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, **F64)
    _, entropy = ek.log_probs_and_entropy(z, tokens, backend="reference")
    means = [entropy[0, [0, 1, 3]].mean().item(), entropy[0, 2].item()]
    # Segment 0 is above its band by 0.1, segment 1 below by 9 - H.
    bounds = (torch.tensor([0.0, 9.0], **F64), torch.tensor([means[0] - 0.1, 9.5], **F64))
    cfg = ek.EPOConfig(
        penalty="quadratic", penalty_alpha=0.5, entropy_coeff=2.0, smooth_coeff=3.0, band_scope="segment",
        loss_agg_mode="seq-mean-token-mean",
    )  # fmt: skip
    out = ek.epo_loss(
        z, tokens, None, zeros, mask, cfg, segment_ids=segments, entropy_bounds=bounds, penalty_weight=1.5,
        backend="reference",
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, z)
    strength = 2.0 * 1.5 * 3.0  # λβk
    of_segment = [strength * 0.75 * (2 * 0.5 * 0.1) / 3, strength * 0.25 * (-2 * 0.5 * (9.0 - means[1])) / 1]
    b = torch.tensor([of_segment[s] - 2.0 * 0.25 for s in (0, 0, 1, 0)] + [0.0], **F64)
    (expected,) = torch.autograd.grad((b * entropy[0]).sum(), z)
    assert_close(got, expected, rtol=1e-10, atol=1e-13)
    penalty = 0.75 * 0.5 * 0.1**2 + 0.25 * 0.5 * (9.0 - means[1]) ** 2
    assert_close(out.metrics.penalty.item(), penalty, rtol=1e-10, atol=0)
    assert_close(out.loss.item(), -2.0 * (entropy[0, :4].sum().item() / 4 - 1.5 * 3.0 * penalty), rtol=1e-10, atol=0)
    assert (out.metrics.above_band_tokens, out.metrics.below_band_tokens) == (3, 1)


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", PENALTIES[1:])
def test_bounds_and_segments_in_every_form_equal_plain_python(penalty, band_scope):
    cfg = ek.EPOConfig(penalty=penalty, penalty_alpha=0.7, band_scope=band_scope, entropy_coeff=0.5)
    turns = torch.tensor([[0, 0, 1, 1, 2], [4, 3, 3, 4, 4], [5, 5, 5, 5, 5]])
    for seed in range(4):
        case = random_case(cfg, seed=seed)
        lower, upper = case["entropy_bounds"]
        for arguments in (
            {"segment_ids": turns},  # bounds a token; in segment scope the tightest hold
            {"entropy_bounds": (lower[:, 0], upper[:, 0])},  # a sequence
            {"entropy_bounds": (lower.flatten()[:6], upper.flatten()[:6]), "segment_ids": turns},  # a segment
            {"entropy_bounds": (lower.flatten()[:9], upper.flatten()[:9]), "segment_ids": turns.int()},  # some unused
            {"entropy_bounds": (torch.full_like(lower, -INF), torch.full_like(upper, INF))},
        ):
            assert_equals_plain({**case, **arguments})


def test_segment_ids_are_not_told_apart_by_sequence():
    cfg = ek.EPOConfig(penalty="hinge", band_scope="segment", entropy_coeff=0.5)
    case = random_case(cfg, mask=torch.ones(3, 5, dtype=torch.bool), segment_ids=torch.zeros(3, 5, dtype=torch.int64))
    out, _, _ = assert_equals_plain(case)
    above = out.metrics.above_band_tokens
    assert above in (0, 15)  # all tokens share one mean
