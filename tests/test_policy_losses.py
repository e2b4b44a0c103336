"""The policy losses: each against its formula in plain Python, at its edge cases, and for every form of batch."""

import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.config import PolicyLossName
from tests.cases import MODES, assert_equals_plain, assert_identical, policy_config, random_case, run, to_packed
from tests.cases import POLICY_VARIANTS as VARIANTS
from tests.test_linear import NEEDS_CPU

F64 = {"dtype": torch.float64}
INF = math.inf
# Losses that are what they are differentiated as; the others weigh the gradient by a detached factor.
DERIVATIVES = ("ppo", "sapo", "sapo-segment", "reinforce", "gspo-mean", "gmpo")
SEQUENCES = tuple(name for name in VARIANTS if not policy_config(name).is_per_token)
TURNS = torch.arange(15).reshape(3, 5) // 2


def one_token(name, log_ratio, advantage, log_prob=-1.0, **settings):
    """(loss, its derivative in the log-prob, metrics) of a batch of one token."""
    log_probs = torch.tensor([[log_prob]], **F64, requires_grad=True)
    old, advantages = log_probs.detach() - log_ratio, torch.full((1, 1), advantage, **F64)
    cfg = policy_config(name, entropy_coeff=0.0, **settings)
    mask = torch.ones(1, 1, dtype=torch.bool)
    out = ek.epo_loss_from_log_probs(log_probs, torch.zeros(1, 1, **F64), old, advantages, mask, cfg)
    (derivative,) = torch.autograd.grad(out.loss, log_probs)
    return out.loss.item(), derivative.item(), out.metrics


def test_every_policy_loss_has_a_variant_here():
    assert {settings.get("policy_loss", "ppo") for settings in VARIANTS.values()} == set(get_args(PolicyLossName))


# ---- against plain Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_plain_python_in_every_form(name):
    bands = [("none", "token"), ("hinge", "token"), ("quadratic", "segment")]
    forms = [{}, {"old_log_probs": None}, {"segment_ids": TURNS}, {"is_weights": 2 * torch.rand(3, 5, **F64)}]
    for seed, ((penalty, scope), form) in enumerate(product(bands, forms)):
        cfg = policy_config(
            name,
            entropy_coeff=0.5,
            kl_coeff=(0.0, 0.3)[seed % 2],
            kl_bias_correction=seed % 4 > 1,
            penalty=penalty,
            band_scope=scope,
            loss_agg_mode=MODES[seed % len(MODES)],
        )
        case = random_case(cfg, seed=seed, penalty_weight=1.7, **form)
        _, gradient, _ = assert_equals_plain(case)
        packed, kept = to_packed(case, [5, 3, 4])
        assert_equals_plain(packed)
        _, gradient = run({**case, "mask": case["mask"] & kept})
        assert_close(run(packed)[1], gradient[kept], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SEQUENCES)
def test_turns_are_sequences_of_their_own_in_segment_scope(name):
    """Two turns of one row equal two rows of one turn each."""
    cfg = policy_config(name, ratio_scope="segment")
    case = random_case(cfg, batch=4, time=3, mask=torch.ones(4, 3, dtype=torch.bool))
    expected, gradient = run(case)

    def joined(value):
        per_token = isinstance(value, torch.Tensor) and value.shape[:2] == (4, 3)
        return value.reshape(2, 6, *value.shape[2:]) if per_token else value

    turns = torch.arange(4).repeat_interleave(3).reshape(2, 6)
    out, got = run({**{key: joined(value) for key, value in case.items()}, "segment_ids": turns})
    assert_close((out.loss, got.reshape(4, 3, 7)), (expected.loss, gradient), rtol=1e-13, atol=1e-15)
    other = {**case, "cfg": policy_config(name, ratio_scope="sequence")}
    assert_identical(run(other), (expected, gradient))  # without ids a sequence is a segment


@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradient_is_the_derivative(name):
    cfg = policy_config(name, entropy_coeff=0.5, kl_coeff=0.3, kl_bias_correction=True)
    case = random_case(cfg, seed=5, segment_ids=TURNS)
    logits = case.pop("logits").requires_grad_()

    def loss(logits):
        return ek.epo_loss(logits, **case, backend="reference").loss

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "settings", "loss", "derivative"),
    [
        ("cispo", 2.0, 1.0, {}, 1.3, -1.3),  # log-prob -1, ratio bounded to 1.3
        ("cispo", 0.5, -1.0, {}, -0.8, 0.8),
        ("cispo", 0.5, 1.0, {"clip_ratio_low": 7.0}, 0.5, -0.5),  # no lower bound
        ("cispo", 0.5, 1.0, {"clip_ratio_low": 1.0, "clip_ratio_high": -0.75}, 0.25, -0.25),
        ("sapo", 1.0, 2.0, {"sapo_tau_pos": 0.5}, -8.0, -2.0),  # the gate is 4/τ · 1/2, its slope 1
        ("sapo", 1.0, -2.0, {"sapo_tau_neg": 2.0}, 2.0, 2.0),
        ("reinforce", 5.0, 3.0, {}, 3.0, -3.0),
        ("dppo-tv", 2.0, 1.0, {"clip_ratio_high": 0.1}, 0.0, 0.0),  # p moves from 0.18 to 0.37
        ("dppo-tv", 2.0, 1.0, {"clip_ratio_high": 0.2}, 1.5, -1.5),  # allowed, and bounded by c
        ("dppo-tv", 2.0, -1.0, {"clip_ratio_low": 0.0}, -1.5, 1.5),  # moves against its advantage
        ("dppo-kl", 0.5, -1.0, {"clip_ratio_low": 0.1}, 0.0, 0.0),
        ("dppo-kl", 0.5, 1.0, {"clip_ratio_high": 0.0}, 0.5, -0.5),
        ("gspo", 2.0, 1.0, {}, -1.3, 0.0),
        ("gspo", 2.0, -1.0, {}, 1.5, 0.0),  # its dual clip
        ("vespo", 2.0, 1.0, {}, 4 * math.exp(-3), -4 * math.exp(-3)),  # w² e^(3 (1 - w))
        ("vespo", 2.0, -1.0, {}, -8 * math.exp(-2), 8 * math.exp(-2)),  # w³ e^(2 (1 - w))
        ("gmpo", math.exp(0.1), 1.0, {}, -math.exp(0.1), -math.exp(0.1)),
        ("gmpo", 2.0, 1.0, {}, -math.exp(0.3), 0.0),
        ("gmpo", 0.5, -1.0, {}, math.exp(-0.2), 0.0),
        ("gmpo", 0.5, 0.0, {}, 0.0, 0.0),
    ],
)
def test_one_token_by_hand(name, ratio, advantage, settings, loss, derivative):
    got = one_token(name, math.log(ratio), advantage, **settings)
    assert_close(got[:2], (loss, derivative), rtol=1e-12, atol=1e-14)


def test_sequence_ratios_weigh_every_token_alike():
    """Two tokens with log-ratios 0 and 0.2: the ratio of both is e^0.1."""
    log_probs = torch.tensor([[-1.0, -2.0]], **F64, requires_grad=True)
    old, advantages = torch.tensor([[-1.0, -2.2]], **F64), torch.tensor([[1.0, 3.0]], **F64)
    for gradient, slopes in (("token", (-0.5, -1.5)), ("sequence", (-1.0, -1.0))):
        cfg = policy_config("gspo", entropy_coeff=0.0, ratio_gradient=gradient)
        mask = torch.ones(1, 2, dtype=torch.bool)
        out = ek.epo_loss_from_log_probs(log_probs, torch.zeros(1, 2, **F64), old, advantages, mask, cfg)
        (derivative,) = torch.autograd.grad(out.loss, log_probs)
        s = math.exp(0.1)
        assert_close(out.loss.item(), -2 * s, rtol=1e-14, atol=0)
        assert_close(derivative, torch.tensor([slopes], **F64) * s, rtol=1e-14, atol=0)
        assert_close(out.metrics.ratio_sum.item(), 2 * s, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["cispo", "gspo", "gmpo"])
def test_a_tie_with_the_upper_bound_is_not_clipped(name):
    log_ratio = 0.25  # exact in old_log_probs, whose log-prob is -1
    ratio = torch.tensor(log_ratio, **F64).exp().item()
    bound = log_ratio if name == "gmpo" else ratio - 1
    loss, derivative, metrics = one_token(name, log_ratio, 1.0, clip_ratio_high=bound)
    assert metrics.clipped_tokens == 0
    assert_close((abs(loss), derivative), (ratio, -ratio), rtol=1e-14, atol=0)
    beyond = one_token(name, log_ratio, 1.0, clip_ratio_high=bound * (1 - 1e-12))
    assert beyond[2].clipped_tokens == 1
    assert_close(beyond[0], loss, rtol=1e-11, atol=0)
    assert (beyond[1] == 0) == (name != "cispo")  # whose gradient does not pass the ratio


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_the_bound_of_the_trust_region_is_inside(divergence):
    log_prob, old = -1.0, -1.5
    p, o = (torch.tensor(value, **F64).exp().item() for value in (log_prob, old))
    others = math.log((1 - o + 1e-8) / (1 - p + 1e-8))
    moved = p - o if divergence == "tv" else o * (old - log_prob) + (1 - o) * others
    for bound, clipped in ((moved, 0), (moved - 1e-9, 1)):
        settings = {"dppo_divergence": divergence, "clip_ratio_high": bound}
        if divergence == "kl":
            settings["clip_ratio_high"] = bound + (1e-15 if clipped == 0 else 0.0)  # its logarithm may round
        assert one_token("dppo-tv", log_prob - old, 1.0, **settings)[2].clipped_tokens == clipped


def test_metrics_of_dppo_count_what_is_truncated_inside_the_region():
    _, _, metrics = one_token("dppo-tv", math.log(2.0), 1.0, clip_ratio_high=0.5)
    assert (metrics.clipped_tokens, metrics.dual_clipped_tokens) == (0, 1)
    _, _, metrics = one_token("dppo-tv", math.log(2.0), 1.0, clip_ratio_high=0.1)
    assert (metrics.clipped_tokens, metrics.dual_clipped_tokens) == (1, 0)


def test_is_weights_of_vespo_are_a_part_of_the_ratio():
    cfg = policy_config("vespo")
    case = random_case(cfg, seed=2)
    factors = 0.8 + 0.4 * torch.rand(3, 5, **F64)
    moved = {**case, "old_log_probs": case["old_log_probs"] - factors.log()}
    weighted, gradient = run({**case, "is_weights": factors})
    expected, expected_gradient = run(moved)
    assert_close((weighted.loss, gradient), (expected.loss, expected_gradient), rtol=1e-12, atol=1e-15)


# ---- conventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(name):
    """With one advantage a sequence; and the same as with the policy's own log-probs for old ones."""
    turns = torch.arange(5) // 2 + 3 * torch.arange(3)[:, None]
    case = random_case(policy_config(name), advantages=torch.randn(3, **F64), old_log_probs=None, segment_ids=turns)
    out, gradient = run(case)
    assert (out.metrics.clipped_tokens, out.metrics.dual_clipped_tokens) == (0, 0)
    assert_close(out.metrics.ratio_sum, out.metrics.tokens, rtol=1e-14, atol=0)
    assert_close(gradient, run({**case, "cfg": ek.EPOConfig(policy_loss="reinforce")})[1], rtol=1e-12, atol=1e-15)
    again = run({**case, "old_log_probs": out.log_probs})
    assert_close((again[0].loss, again[1]), (out.loss, gradient), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_tokens_are_never_read(name):
    cfg = policy_config(
        name, kl_coeff=0.2, kl_bias_correction=True, penalty="hinge", loss_agg_mode="seq-mean-token-sum"
    )
    case = random_case(cfg, seed=3, segment_ids=TURNS, is_weights=torch.rand(3, 5, **F64))
    case["mask"][1, 2] = False
    expected, mask = run(case), case["mask"]
    poisoned = {
        key: torch.where(mask, value, math.nan)
        for key, value in case.items()
        if key in ("old_log_probs", "advantages", "ref_log_probs", "is_weights")
    }
    poisoned["logits"] = torch.where(mask[..., None], case["logits"], math.nan)
    poisoned["tokens"] = torch.where(mask, case["tokens"], -100)
    poisoned["segment_ids"] = torch.where(mask, TURNS, -100)
    out, gradient = run({**case, **poisoned})
    assert_identical((out, gradient), expected)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_minus_inf_at_the_sampled_token(name):
    case = random_case(policy_config(name, entropy_coeff=0.0), batch=1, time=4)
    case["mask"][:] = True
    case["advantages"] = torch.tensor([[0.5, -1.0, 0.7, 1.0]], **F64)
    case["logits"][0, 1, 3], case["tokens"][0, 1], case["old_log_probs"][0, 1] = -INF, 3, -0.5
    factor = name.split("-")[0] in ("cispo", "reinforce", "dppo", "vespo")
    out, gradient = run(case)
    expected = assert_equals_plain(case)[2]
    assert math.isfinite(expected.loss) == torch.isfinite(out.loss).item()
    assert not gradient.isnan().any()
    assert out.metrics.nonfinite_tokens == (factor and not name.startswith("dppo"))  # dppo: outside of its region
    out, gradient = run({**case, "old_log_probs": None})
    assert out.metrics.nonfinite_tokens == (4 if name in SEQUENCES else 1)
    assert gradient[0, 1].isnan().all() or name == "reinforce"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_nan_makes_the_rows_that_read_it_nan(name):
    case = random_case(policy_config(name), mask=torch.ones(3, 5, dtype=torch.bool), segment_ids=TURNS)
    turn = TURNS.eq(TURNS[1, 2]) if "segment" in name else torch.arange(3)[:, None].expand(3, 5) == 1
    alone = torch.zeros(3, 5, dtype=torch.bool)
    alone[1, 2] = True
    for key in ("logits", "old_log_probs", "advantages"):
        poisoned = {**case, key: case[key].clone()}
        poisoned[key][1, 2] = math.nan
        out, gradient = run(poisoned)
        lost = turn if name in SEQUENCES and (key != "advantages" or name == "gmpo") else alone
        if name == "reinforce" and key == "old_log_probs":
            lost = torch.zeros_like(alone)
        # The derivative of a mean goes from one token's loss to all.
        rows = turn if lost.any() and name in ("sapo-segment", "gspo-mean") else lost
        assert torch.equal(gradient.isnan().all(-1), rows), key
        assert not gradient[~rows].isnan().any(), key
        assert out.metrics.nonfinite_tokens == lost.sum(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_of_no_tokens_and_of_one(name):
    cfg = policy_config(name, entropy_coeff=0.0)
    for shape in ((0, 3), (2, 0), (0,), (1, 1), (1,)):
        per_token, logits = torch.zeros(shape, **F64), torch.randn(*shape, 7, **F64).requires_grad_()
        borders = torch.tensor([0, per_token.shape[0]]) if len(shape) == 1 else None
        out = ek.epo_loss(
            logits, per_token.long(), None, per_token + 1.0, per_token + 1.0, cfg, cu_seqlens=borders,
            segment_ids=per_token.long(), num_segments=1, backend="reference",
        )  # fmt: skip
        out.loss.backward()
        assert out.metrics.tokens == per_token.numel()
        assert logits.grad.any() == (per_token.numel() > 0)
        assert torch.isfinite(out.loss)
    out, gradient = run(random_case(cfg, mask=torch.zeros(3, 5, dtype=torch.bool)))
    assert out.loss == 0
    assert not gradient.any()


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"policy_loss": "grpo"}, r"policy_loss must be one of ppo, cispo, .*got 'grpo'"),
        ({"ratio_scope": "sequence"}, r"ratio_scope .*policy_loss='gspo'"),
        ({"policy_loss": "gspo", "ratio_scope": "token"}, r"ratio_scope must be None or one of sequence, segment"),
        ({"policy_loss": "dppo", "ratio_scope": "turn"}, r"ratio_scope must be None or one of token"),
        ({"ratio_gradient": "sequence"}, r"ratio_gradient must be 'token' .*policy_loss='gspo'"),
        ({"policy_loss": "sapo", "ratio_gradient": "sequence"}, r"ratio_gradient .*ratio_scope='sequence'"),
        ({"policy_loss": "vespo", "ratio_gradient": "sequence"}, r"ratio_gradient must be 'token'"),
        ({"policy_loss": "gspo", "ratio_gradient": "mean"}, r"ratio_gradient must be one of token, sequence"),
        ({"dppo_divergence": "js"}, r"dppo_divergence must be one of tv, kl"),
        ({"sapo_tau_pos": 0.0}, r"sapo_tau_pos must be finite and in \(0, inf\)"),
        ({"sapo_tau_neg": -1.0}, r"sapo_tau_neg must be finite and in \(0, inf\)"),
        ({"vespo_k_neg": -1.0}, r"vespo_k_neg must be finite and in \[0, inf\)"),
        ({"vespo_lambda_pos": 0}, r"vespo_lambda_pos must be finite and in \(0, inf\)"),
        ({"policy_loss": "gspo", "clip_ratio_low": 1.5}, r"clip_ratio_low must be finite and in \[0, 1\]"),
        ({"policy_loss": "sapo", "clip_ratio_high": -0.5}, r"clip_ratio_high must be finite and in \[0, inf\)"),
        ({"policy_loss": "cispo", "clip_ratio_high": -0.5}, r"clip_ratio_high .*clip_ratio_low=1.0"),
    ],
)
def test_settings_that_make_no_sense_raise(settings, match):
    with pytest.raises(ValueError, match=match):
        ek.EPOConfig(**settings)


def test_kl_bias_correction_is_a_bool():
    with pytest.raises(TypeError, match="kl_bias_correction must be a bool, got 1"):
        ek.EPOConfig(kl_bias_correction=1)


def test_the_scope_of_the_ratio_defaults_to_that_of_the_loss():
    scopes = {name: ek.EPOConfig(policy_loss=name).ratio_unit for name in get_args(PolicyLossName)}
    assert {name for name, scope in scopes.items() if scope == "sequence"} == {"gspo", "vespo", "gmpo"}
    assert {name for name, scope in scopes.items() if scope == "token"} == set(scopes) - {"gspo", "vespo", "gmpo"}


def test_packed_sequences_must_be_known():
    packed, _ = to_packed(random_case(policy_config("gspo")), [5, 2, 3])
    del packed["cu_seqlens"]
    with pytest.raises(ValueError, match=r"cu_seqlens must be given .*policy_loss='gspo'"):
        run(packed)
    turns = {**packed, "cfg": policy_config("gspo", ratio_scope="segment")}
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        run(turns)
    assert torch.isfinite(run({**turns, "segment_ids": torch.arange(10) // 3})[0].loss)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cispo", "sapo", "reinforce", "dppo-kl", "gspo-mean", "vespo", "gmpo"])
def test_compiles_to_one_graph(name):
    compare_compiled(name, "reference")


@NEEDS_CPU
def test_compiles_with_a_fused_backend():
    compare_compiled("gspo", "cpu")


def compare_compiled(name, backend):
    cfg = policy_config(name, kl_coeff=0.1, kl_bias_correction=True)
    case = random_case(cfg, dtype=torch.float32, segment_ids=TURNS, is_weights=torch.rand(3, 5))
    packed, _ = to_packed(case, [5, 2, 3])
    logits = packed.pop("logits")

    def step(function):
        leaf = logits.clone().requires_grad_()
        out = function(leaf)
        out.loss.backward()
        return out.loss.detach(), out.metrics.values, leaf.grad

    def loss(leaf):
        return ek.epo_loss(leaf, **packed, backend=backend)

    torch._dynamo.reset()
    compiled = step(torch.compile(loss, fullgraph=True, backend="eager"))
    torch._dynamo.reset()
    for got, expected in zip(compiled, step(loss), strict=True):
        assert_close(got, expected, rtol=2e-5, atol=2e-6)
