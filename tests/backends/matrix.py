"""The tests that every fused backend must pass: subclass `BackendMatrix` in a test module and name the backend.

Three-way rule: against the reference in float64, a backend's error is at most that of the reference in the logits' own
dtype, plus a rounding. Ratios and KL are exponentials of log-probs, so a rounding of a log-prob is one of the loss and,
relative to it, of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels import backends, reference
from epo_kernels.config import KLType, LossAggMode, Penalty
from epo_kernels.fused.rows import Rows, RowStatistics
from epo_kernels.inputs import LogitTransform
from tests.cases import TOKEN_POLICIES, assert_identical, metrics_of, policy_config, random_case, run, to_packed

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = ("tokens", "sequences", *(name for name in ek.metrics.METRIC_NAMES if name.endswith("_tokens")))
BUSY = ek.EPOConfig(penalty="hinge", penalty_alpha=0.7, entropy_coeff=0.3, kl_coeff=0.2, clip_ratio_c=2.0)


def busy_case(cfg=BUSY, **arguments):
    """A case with every term, and with tokens on both sides of their band."""
    case = random_case(cfg, **{"dtype": torch.float32, **arguments})
    shape = case["tokens"].shape
    if cfg.penalty != "none" and "entropy_bounds" not in arguments:
        _, entropy = ek.log_probs_and_entropy(case["logits"].double(), case["tokens"], backend="reference")
        middle = entropy * (0.8 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
        case["entropy_bounds"] = ((middle * 0.95).float(), (middle * 1.05).float())
    return case


def moved(case, device, dtype=None):
    """The arguments on a device; floats in dtype, if given."""

    def move(value):
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(move, value))
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else None)

    return {name: move(value) for name, value in case.items()}


def assert_no_worse(name, fused, eager, truth, rounding):
    """max |fused - truth| <= max |eager - truth| + rounding, in absolute terms."""
    fused, eager, truth = (values.detach().double().cpu() for values in (fused, eager, truth))
    own, others = ((values - truth).abs().max().item() for values in (fused, eager))
    assert own <= others + rounding, f"{name}: error {own:.3g}, eager's {others:.3g}, a rounding {rounding:.3g}"


def check_three_ways(case, backend, device, roundings=1):
    """Loss, log-probs, entropy, gradient and metrics of one case; returns (out, gradient) of the backend.

    roundings: how many it may be worse than eager by. Terms of a token may cancel, which one case in hundreds shows.
    """
    dtype = case["logits"].dtype
    truth, true_gradient = run(moved(case, "cpu", torch.float64))
    eager, eager_gradient = run(moved(case, device))
    fused, gradient = run(moved(case, device), backend)
    single = roundings * torch.finfo(torch.float32).eps * max(truth.log_probs.abs().max().item(), 1.0)
    for name in ("loss", "log_probs", "entropy"):
        # A loss of ratios near e^20 is far larger than log-probs, and so is its rounding.
        of_loss = torch.finfo(torch.float32).eps * truth.loss.abs().item() if name == "loss" else 0.0
        assert_no_worse(name, getattr(fused, name), getattr(eager, name), getattr(truth, name), max(single, of_loss))
    assert gradient.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, single) * true_gradient.abs().max().item()
    assert_no_worse("gradient", gradient, eager_gradient, true_gradient, rounding)
    expected = metrics_of(truth)
    for name, value in metrics_of(fused).items():
        if name in COUNTS:
            assert value == expected[name], name
        else:
            assert_close(value, expected[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    return fused, gradient


def as_strided(logits, kind):
    """The same logits in another memory layout."""
    if kind == "rows":  # a slice of longer rows and sequences, an odd offset before them
        wide = logits.new_full((logits.shape[0] + 1, logits.shape[1] + 2, logits.shape[2] + 3), math.nan)
        view = wide[1:, 1:-1, 1:-2]
        return view.copy_(logits)
    if kind == "vocab":
        return logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


class BackendMatrix:
    """Subclass as `class TestX(BackendMatrix)` with these two."""

    backend = ""
    device = "cpu"

    def check(self, case):
        return check_three_ways(case, self.backend, self.device)

    def run(self, case, **kwargs):
        return run(moved(case, self.device), self.backend, **kwargs)

    # ---- the maths ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [1, 2, 1000, 4097])
    def test_every_vocabulary_and_dtype(self, vocab, dtype):
        self.check(busy_case(vocab=vocab, dtype=dtype, batch=2, time=4))

    def test_a_large_vocabulary(self):
        self.check(busy_case(vocab=151_936, dtype=torch.bfloat16, batch=1, time=2))

    @pytest.mark.parametrize("scope", ["token", "segment"])
    @pytest.mark.parametrize("penalty", get_args(Penalty))
    def test_every_penalty(self, penalty, scope):
        cfg = ek.EPOConfig(penalty=penalty, penalty_alpha=0.7, entropy_coeff=0.5, band_scope=scope)
        turns = torch.arange(5).expand(3, 5) // 2 + 3 * torch.arange(3)[:, None]
        self.check(busy_case(cfg, vocab=50, segment_ids=turns, penalty_weight=1.5))

    @pytest.mark.parametrize("kl_type", get_args(KLType))
    def test_every_kl(self, kl_type):
        cfg = ek.EPOConfig(kl_type=kl_type, kl_coeff=0.4)
        case = busy_case(cfg, vocab=50)
        case["ref_log_probs"][0, :3] += torch.tensor([-30.0, 30.0, -2.5])  # past the clamps of k3
        self.check(case)

    @pytest.mark.parametrize("policy", TOKEN_POLICIES)
    def test_every_policy_loss(self, policy, monkeypatch):
        cfg = policy_config(policy, penalty="hinge", penalty_alpha=0.7, entropy_coeff=0.3, kl_coeff=0.2)
        if cfg.policy_loss == "dppo":  # probabilities of 20 tokens move less than ratios do
            cfg = replace(cfg, clip_ratio_low=0.03, clip_ratio_high=0.01, clip_ratio_c=1.1)
        case = busy_case(cfg, vocab=20, is_weights=torch.linspace(0.0, 3.0, 15).view(3, 5))
        monkeypatch.setattr(type(backends._BACKENDS[self.backend].kernels), "statistics", None)  # in one pass
        out, _ = self.check(case)
        if cfg.policy_loss in ("cispo", "dppo"):
            assert 0 < metrics_of(out)["clipped_tokens"] < metrics_of(out)["tokens"]
        if policy == "dppo-tv":
            assert 0 < metrics_of(out)["dual_clipped_tokens"] < metrics_of(out)["tokens"]
        cfg = replace(cfg, clip_ratio_low=0.0, clip_ratio_high=0.0)
        out, _ = self.check({**case, "cfg": cfg, "old_log_probs": None})
        assert metrics_of(out)["clipped_tokens"] == 0  # exactly at the bounds, which count as inside

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("mode", get_args(LossAggMode))
    def test_every_aggregation(self, mode, packed):
        case = busy_case(ek.EPOConfig(loss_agg_mode=mode), vocab=20, loss_scale=0.5)
        self.check(to_packed(case, [5, 3, 4])[0] if packed else case)
        self.check({**case, "normalizer": 6.0})

    @pytest.mark.parametrize(
        "arguments",
        [
            {"old_log_probs": None},
            {"advantages": torch.tensor([1.5, -2.0, 0.5])},
            {"is_weights": torch.linspace(0.0, 3.0, 15).view(3, 5)},
            {"temperature": 0.7},
            {"temperature": torch.tensor(1.3)},
            {"temperature": torch.linspace(0.5, 2.0, 15).view(3, 5)},
            {"logit_softcap": 3.0},
            {"logit_scale": 0.25},
            {"logit_scale": -1.5, "logit_softcap": 4.0, "temperature": 1.7},
            {"vocab_size": 40},
            {"vocab_size": 40, "logit_softcap": 3.0},
            {"entropy_coeff": torch.tensor(0.0), "kl_coeff": torch.tensor(0.0), "penalty_weight": torch.tensor(0.0)},
            {"normalizer": torch.tensor(3.0), "loss_scale": torch.tensor(2.0), "kl_coeff": torch.tensor(0.3)},
        ],
        ids=lambda arguments: "-".join(arguments),
    )
    def test_every_argument(self, arguments):
        case = busy_case(vocab=50)
        case["tokens"] %= 40
        self.check({**case, **arguments})

    def test_no_dual_clip(self):
        case = busy_case(ek.EPOConfig(clip_ratio_c=None), vocab=20)
        case["old_log_probs"][0, :4] -= torch.tensor([25.0, 3.0, -25.0, -3.0])  # past the clamp of the ratio's exponent
        self.check(case)

    def test_bounds_of_infinity(self):
        case = busy_case(vocab=20)
        unknown = torch.full((3, 5), INF)
        self.check({**case, "entropy_bounds": (-unknown, unknown)})

    @pytest.mark.parametrize(
        ("cfg", "count"),
        [
            (BUSY, 3),
            (replace(BUSY, penalty="none"), 3),
            (replace(BUSY, band_scope="segment"), 4),  # the two turns in which they stand
            (replace(BUSY, band_scope="segment", penalty="none"), 4),
        ],
    )
    def test_bad_bounds_are_counted_and_make_the_loss_nan(self, cfg, count, monkeypatch):
        monkeypatch.setattr("epo_kernels.inputs.checks.checks_values", lambda device: False)  # as on CUDA
        turns = torch.arange(5).expand(3, 5) // 2 + 3 * torch.arange(3)[:, None]
        lower, upper = torch.full((3, 5), 0.5), torch.full((3, 5), 1.0)
        case = busy_case(cfg, vocab=20, segment_ids=turns, entropy_bounds=(lower, upper))
        case["mask"][0, :4], case["mask"][1, 0] = True, False
        sound, _ = self.run(case)
        lower[0, 0], upper[0, 1], lower[0, 2] = math.nan, math.nan, 1.1
        lower[1, 0] = math.nan  # masked: never read
        out, gradient = self.run(case)
        assert sound.loss.isfinite()
        assert out.loss.isnan()
        assert metrics_of(out)["invalid_tokens"] == count
        assert metrics_of(out)["nonfinite_tokens"] == 0
        assert_close(out.log_probs, sound.log_probs)
        bad = gradient.isnan().any(-1).cpu()
        assert bad.sum() == count
        assert bad[0, :4].sum() == count

    @pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
    def test_a_coefficient_of_zero_multiplies_nothing(self, zero):
        case = busy_case(replace(BUSY, kl_type="k2"), vocab=20)  # infinite, where k3 is clamped
        case["ref_log_probs"] = torch.full((3, 5), -INF)
        unknown = torch.full((3, 5), INF)  # a lower bound that nothing reaches: the penalty is infinite
        case = {**case, "entropy_bounds": (unknown, unknown), "kl_coeff": zero, "penalty_weight": zero}
        out, gradient = self.run(case)
        expected, expected_gradient = run(case)
        assert out.loss.isfinite()
        assert_close(out.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-6)
        assert_close(gradient.cpu(), expected_gradient, rtol=1e-5, atol=1e-6)

    # ---- ties --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    @pytest.mark.parametrize("bound", ["clip_ratio_low", "clip_ratio_high", "clip_ratio_c"])
    def test_ties_have_the_gradient_of_the_unclipped_ratio(self, bound, advantage):
        """Clip bounds placed exactly at the backend's own ratio, and slightly inside of it."""
        off = {"clip_ratio_low": 1.0, "clip_ratio_high": 10.0, "clip_ratio_c": None, "entropy_coeff": 0.0}
        wanted = 0.7 if bound == "clip_ratio_low" else 1.6
        case = {
            "logits": torch.zeros(1, 1, 4),
            "tokens": torch.zeros(1, 1, dtype=torch.int64),
            "old_log_probs": torch.tensor([[-2 * math.log(2) - math.log(wanted)]]),
            "advantages": torch.full((1, 1), advantage),
            "mask": torch.ones(1, 1),
        }
        ratio = metrics_of(self.run({**case, "cfg": ek.EPOConfig(**off)})[0])["ratio_sum"]
        at_ratio = {"clip_ratio_low": 1.0 - ratio, "clip_ratio_high": ratio - 1.0, "clip_ratio_c": ratio}[bound]
        for tie in (True, False):
            cfg = ek.EPOConfig(**{**off, bound: at_ratio if tie else at_ratio - 1e-3})
            out, gradient = self.run({**case, "cfg": cfg})
            bites = not tie and (advantage > 0) == (bound == "clip_ratio_high")
            assert metrics_of(out)["clipped_tokens"] == (bites and bound != "clip_ratio_c")
            assert metrics_of(out)["dual_clipped_tokens"] == (bites and bound == "clip_ratio_c")
            full = -advantage * ratio * (torch.tensor([1.0, 0.0, 0.0, 0.0]) - 0.25)
            assert_close(gradient.cpu()[0, 0], torch.zeros(4) if bites else full)

    # ---- edges -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_impossible_tokens(self, dtype):
        case = busy_case(vocab=3000, dtype=dtype)
        logits = case["logits"]
        logits[0, :, :2500] = -INF  # whole blocks, at either end of the row, and all but the sampled token
        logits[1, :, 300:] = -INF
        logits[2, 0] = -INF
        case["mask"][2, 0] = True
        for b, t in ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)):
            token = 2600 + t if b == 0 else 100 + t
            case["tokens"][b, t] = token
            logits[b, t, token] = 0.5
        case["old_log_probs"] = torch.full((3, 5), -5.0)
        case["ref_log_probs"] = torch.full((3, 5), -5.5)
        _, gradient = self.check(case)
        assert not gradient[logits.to(gradient.device) == -INF].any()

    @pytest.mark.parametrize("bad", ["nan", "+inf", "all -inf"])
    def test_rows_that_are_not_finite(self, bad):
        case = busy_case(vocab=700)
        case["mask"][0, 1] = True
        if bad == "all -inf":
            case["logits"][0, 1] = -INF
        else:
            case["logits"][0, 1, 650] = float(bad)
        out, gradient = self.run({**case, "vocab_size": 690, "tokens": case["tokens"] % 690})
        assert out.loss.isnan()
        assert out.log_probs[0, 1].isnan()
        assert out.entropy[0, 1].isnan()
        assert metrics_of(out)["nonfinite_tokens"] == 1
        assert gradient[0, 1, :690].isnan().all()
        assert not gradient[..., 690:].any()
        gradient[0, 1] = 0
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("name", ["old_log_probs", "ref_log_probs", "advantages", "is_weights"])
    @pytest.mark.parametrize("kl_type", get_args(KLType))
    def test_a_loss_of_nan_has_a_gradient_of_nan(self, name, kl_type):
        case = busy_case(replace(BUSY, kl_type=kl_type), vocab=30, is_weights=torch.ones(3, 5))
        case["mask"][0, 1] = True
        case[name][0, 1] = math.nan
        out, gradient = self.run(case)
        assert out.loss.isnan()
        assert metrics_of(out)["nonfinite_tokens"] == 1
        assert gradient[0, 1].isnan().all()
        gradient[0, 1] = 0
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("policy", ["ppo", *TOKEN_POLICIES])
    def test_policy_losses_at_their_edges(self, policy):
        """One unusual token next to a normal one: loss, gradient and metrics equal the reference's."""
        logits = torch.tensor([[[0.0, 1.0, -1.0, 0.5], [0.3, -0.2, 0.1, 0.4]]])
        sound = {"old_log_probs": -1.0, "advantages": 1.0, "is_weights": 1.0}
        edges = [
            {"advantages": 0.0},
            {"advantages": math.nan},
            {"advantages": math.nan, "old_log_probs": -30.0},
            {"old_log_probs": math.nan},
            {"old_log_probs": -INF},
            {"old_log_probs": -30.0},
            {"old_log_probs": 0.0, "advantages": -1.0},
            {"old_log_probs": 1.2e-7, "advantages": -1.0},  # as rounding leaves it
            {"is_weights": 0.0, "old_log_probs": -INF},
            {"token": -INF},
            {"token": -INF, "advantages": 0.0},
            {"token": -INF, "is_weights": 0.0},
            {"token": -INF, "advantages": -1.0, "old_log_probs": -2.0},
            {"token": math.nan},
        ]
        for odd in edges:
            rows = logits.clone()
            rows[0, 0, 1] = odd.get("token", 1.0)
            given = {name: torch.tensor([[odd.get(name, value), value]]) for name, value in sound.items()}
            if "token" in odd and "old_log_probs" not in odd:
                given["old_log_probs"] = None
            cfg = policy_config(policy, entropy_coeff=0.1)
            case = {"logits": rows, "tokens": torch.ones(1, 2, dtype=torch.int64), "mask": torch.ones(1, 2), "cfg": cfg}
            out, gradient = self.run({**case, **given})
            expected, expected_gradient = run({**case, **given})
            close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
            assert_close(out.loss.cpu(), expected.loss, **close, msg=lambda text, odd=odd: f"{odd}: {text}")
            assert_close(gradient.cpu(), expected_gradient, **close, msg=lambda text, odd=odd: f"{odd}: {text}")
            assert_close(metrics_of(out), metrics_of(expected), **close, msg=lambda text, odd=odd: f"{odd}: {text}")

    @pytest.mark.parametrize("arguments", [{}, {"logit_scale": -1.5}, {"logit_softcap": 3.0, "temperature": 0.7}])
    def test_rows_in_parts(self, arguments):
        """Each part's statistics merge into the row's; with those, gradients of the parts are parts of the row's."""
        kernels = backends._BACKENDS[self.backend].kernels
        logits = (3 * torch.randn(1, 6, 300)).to(self.device)
        hopeless = INF if arguments.get("logit_scale", 1.0) < 0 else -INF
        logits[0, :2, 200:] = hopeless  # an impossible part; in the second row, the token's own part
        tokens = torch.tensor([[5, 299, 100, 199, 200, 299]]).to(self.device)
        mask = torch.tensor([[True, True, True, True, True, False]]).to(self.device)
        a, b = torch.randn(2, 1, 6).to(self.device)
        settings = {"temperature": 1.0, "logit_softcap": None, "logit_scale": None, **arguments}
        scale, softcap = settings["logit_scale"], settings["logit_softcap"]
        transforms = [LogitTransform(width, settings["temperature"], softcap, scale) for width in (100, 100, 90, 290)]
        starts = (0, 100, 200)
        parts = [
            Rows(logits[..., start : start + 100], tokens - start, mask, transform)
            for start, transform in zip(starts, transforms[:3], strict=True)
        ]
        log_probs, entropy, maximum, total = (
            torch.stack(values) for values in zip(*(kernels.statistics(p, entropy=True) for p in parts), strict=True)
        )
        scale = kernels.maximum_scale(transforms[0])
        whole = reference.merge_statistics(log_probs, entropy, maximum, total, scale, tokens // 100, tokens < 290)
        merged = RowStatistics(*(torch.where(mask, value, 0) for value in whole))
        expected = kernels.statistics(Rows(logits, tokens, mask, transforms[3]), entropy=True)
        assert_close(merged.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert_close(merged.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
        assert_close(merged.maximum[mask], expected.maximum[mask], rtol=0, atol=0)
        gradient = torch.full_like(logits, math.nan)
        kernels.gradient(Rows(logits, tokens, mask, transforms[3]), expected, a, b, gradient)
        assert gradient[0, 1, :290].isnan().all()  # its token is padding
        for start, part in zip(starts, parts, strict=True):
            out = torch.full_like(part.logits, math.nan)
            kernels.gradient(part, merged, a, b, out)
            assert_close(out, gradient[..., start : start + 100], rtol=1e-4, atol=1e-6, equal_nan=True)
        spreads = [kernels.spread(part, merged) for part in parts]
        for own, all_of_it in zip(
            zip(*spreads, strict=True), kernels.spread(Rows(logits, tokens, mask, transforms[3]), expected), strict=True
        ):
            assert_close(sum(own), all_of_it, rtol=1e-4, atol=1e-6)

    def test_a_band_of_segments_without_a_penalty_costs_one_pass(self, monkeypatch):
        cfg = ek.EPOConfig(band_scope="segment", entropy_coeff=0.5)
        bounds = torch.full((3, 5), 0.9 * math.log(50)), torch.full((3, 5), 0.95 * math.log(50))
        monkeypatch.setattr(type(backends._BACKENDS[self.backend].kernels), "statistics", None)
        out, _ = self.check(busy_case(cfg, vocab=50, entropy_bounds=bounds))
        assert metrics_of(out)["below_band_tokens"] > 0

    @pytest.mark.parametrize(
        ("changed", "upstream"),
        [
            ({"log_ratio": 9.0, "normalizer": 45}, 1.0),  # up to e^9 / 45 = 180
            ({"log_ratio": 17.5, "loss_scale": 2.0**-4}, 2.0**-4),
            ({"temperature": 0.01, "log_ratio": 5.0}, 1.0),
            ({"is_weights": 1e4, "log_ratio": 2.0}, 0.5),
            ({"advantages": -3e4, "normalizer": 1e3}, 1.0),
            ({"normalizer": 1e-3}, 10.0),
            ({"normalizer": 2.0**26, "log_ratio": 6.0}, 65536.0),
            ({"loss_scale": 2.0**-20, "log_ratio": 12.0}, 65536.0),
        ],
    )
    def test_float16_gradients_are_those_of_eager(self, changed, upstream):
        """One token's gradient is far larger than the others'."""
        cfg = replace(BUSY, clip_ratio_c=None, penalty="none", kl_coeff=0.0)
        case = busy_case(cfg, vocab=20, batch=1, time=3, dtype=torch.float16)
        case["advantages"], case["is_weights"] = -torch.ones(1, 3), torch.ones(1, 3)
        settings = dict(changed)
        logits, temperature = case["logits"].double(), settings.get("temperature", 1.0)
        log_probs, _ = ek.log_probs_and_entropy(logits, case["tokens"], temperature=temperature, backend="reference")
        case["old_log_probs"] = (log_probs - torch.tensor([0.0, settings.pop("log_ratio", 0.0), 0.5])).float()
        for name in {"advantages", "is_weights"} & set(settings):
            case[name][0, 1] = settings.pop(name)
        case |= settings
        _, truth = run(moved(case, "cpu", torch.float64), upstream=upstream)
        _, eager = run(moved(case, self.device), upstream=upstream)
        _, ours = self.run(case, upstream=upstream)
        assert 2.0**-10 < truth.abs().max() < 60_000
        rounding = torch.maximum(2.0**-10 * truth.abs().amax(-1, keepdim=True), torch.tensor(2.0**-24))
        error, allowed = ((values.cpu().double() - truth).abs() for values in (ours, eager))
        assert (error <= allowed + rounding).all()

    def test_invalid_tokens_are_counted_and_make_the_loss_nan(self, monkeypatch):
        monkeypatch.setattr("epo_kernels.inputs.checks.checks_values", lambda device: False)
        case = busy_case(vocab=30)
        case["mask"][0, :4] = True
        case["tokens"][0, :4] = torch.tensor([30, -1, 2**40, -(2**62)])
        out, gradient = self.run(case)
        expected, expected_gradient = run(case)
        assert metrics_of(out)["invalid_tokens"] == metrics_of(expected)["invalid_tokens"] == 4
        assert metrics_of(out)["nonfinite_tokens"] == 0
        assert out.loss.isnan()
        assert_close(out.entropy.cpu(), expected.entropy)
        assert_close(gradient.cpu(), expected_gradient, equal_nan=True)

    @pytest.mark.parametrize("scope", ["token", "segment"])
    def test_masked_tokens_are_never_read(self, scope):
        cfg = ek.EPOConfig(penalty="hinge", band_scope=scope, entropy_coeff=0.5, kl_coeff=0.2)
        clean = busy_case(cfg, vocab=40, is_weights=torch.rand(3, 5), temperature=1 + torch.rand(3, 5))
        masked = ~clean["mask"]
        expected = self.run(clean)
        assert not expected[1][masked].any()
        assert not expected[0].log_probs[masked].any()
        assert not expected[0].entropy[masked].any()

        def poisoned(value, poison):
            return value.clone().index_put((masked,), torch.tensor(poison, dtype=value.dtype))

        for poison, token in ((math.nan, -100), (INF, 2**40)):
            case = {**clean, "tokens": poisoned(clean["tokens"], token)}
            for name in ("logits", "old_log_probs", "advantages", "ref_log_probs", "is_weights", "temperature"):
                case[name] = poisoned(clean[name], poison)
            case["entropy_bounds"] = tuple(poisoned(bound, poison) for bound in clean["entropy_bounds"])
            assert_identical(self.run(case), expected)

    def test_no_tokens(self):
        for batch, time in ((0, 4), (2, 0)):
            case = busy_case(vocab=5, batch=2, time=4)
            case = {k: v[:batch, :time] if isinstance(v, torch.Tensor) else v for k, v in case.items()}
            case["entropy_bounds"] = tuple(bound[:batch, :time] for bound in case["entropy_bounds"])
            out, gradient = self.run(case)
            assert out.loss == 0
            assert gradient.shape == (batch, time, 5)
            assert not out.metrics.values.any()

    def test_no_token_that_counts(self):
        for dtype in (torch.float32, torch.float16):
            case = busy_case(vocab=50, dtype=dtype, mask=torch.zeros(3, 5))
            case["logits"] = case["logits"] * math.nan
            out, gradient = self.run(case)
            assert out.loss == 0
            assert not gradient.any()
            assert not out.metrics.values.any()

    def test_one_token(self):
        self.check(busy_case(vocab=100, batch=1, time=1))

    @pytest.mark.parametrize("kind", ["rows", "vocab", "time first"])
    def test_strides_change_nothing(self, kind):
        case = busy_case(vocab=333, dtype=torch.bfloat16)
        expected = self.run(case)
        logits = as_strided(case["logits"].to(self.device), kind)
        assert not logits.is_contiguous()
        arguments = moved(case, self.device)
        for name in ("tokens", "mask", "old_log_probs", "advantages", "ref_log_probs"):
            arguments[name] = arguments[name].t().contiguous().t()
        leaf = logits.detach().requires_grad_()
        out = ek.epo_loss(**{**arguments, "logits": leaf}, backend=self.backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        # Another alignment may sum a row in another order.
        assert_close(out.loss, expected[0].loss, rtol=1e-6, atol=1e-6)
        assert_close(gradient, expected[1], rtol=2**-7, atol=1e-9)

    def test_an_exact_offset_changes_nothing(self):
        case = busy_case(vocab=999)
        case["logits"] = (case["logits"] * 64).round() / 64
        shifted = {**case, "logits": case["logits"] + 4096.0}
        assert_identical(self.run(case), self.run(shifted))

    def test_the_same_input_gives_the_same_bits(self):
        case = busy_case(vocab=5000, dtype=torch.bfloat16)
        assert_identical(self.run(case), self.run(case))

    # ---- float16 -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", get_args(LossAggMode))
    def test_float16_gradients_do_not_underflow(self, mode):
        cfg = ek.EPOConfig(loss_agg_mode=mode, entropy_coeff=0.0)
        case = busy_case(cfg, vocab=64, dtype=torch.float16)
        tiny = {**case, "loss_scale": 2.0**-24}
        _, gradient = self.run(tiny, upstream=2.0**24)
        _, expected = self.run(case)
        assert_close(gradient, expected, rtol=2e-3, atol=2e-7)

    # ---- log-probs and entropy ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("entropy", [True, False])
    def test_log_probs_and_entropy(self, entropy, dtype):
        case = busy_case(vocab=2500, dtype=dtype)
        weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        arguments = {"mask": case["mask"], "temperature": 0.8, "entropy": entropy}

        def both(logits, backend):
            leaf = logits.detach().requires_grad_()
            tokens, scale = case["tokens"].to(leaf.device), weights.to(leaf.device)
            values = ek.log_probs_and_entropy(leaf, tokens, **moved(arguments, leaf.device), backend=backend)
            total = sum((value * w).sum() for value, w in zip(values, scale, strict=True) if value is not None)
            return values, torch.autograd.grad(total, leaf)[0]

        truth, eager, fused = (
            both(case["logits"].double(), "reference"),
            both(case["logits"].to(self.device), "reference"),
            both(case["logits"].to(self.device), self.backend),
        )
        for a, b, c in zip(fused[0], eager[0], truth[0], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_no_worse("statistics", a, b, c, torch.finfo(torch.float32).eps * c.abs().max().item())
        rounding = torch.finfo(dtype).eps * truth[1].abs().max().item()
        assert_no_worse("gradient", fused[1], eager[1], truth[1], rounding)

    # ---- distribution statistics -------------------------------------------------------------------------------------

    def check_distribution(self, logits, **arguments):
        """Apply the three-way rule to each statistic; returns the backend's statistics."""
        arguments = {"temperature": 0.8, **arguments}
        truth = ek.distribution_statistics(logits.double(), **arguments, backend="reference")
        on_device = {**moved(arguments, self.device), "logits": logits.to(self.device)}
        eager = ek.distribution_statistics(**on_device, backend="reference")
        fused = ek.distribution_statistics(**on_device, backend=self.backend)
        # p = weight / sum is two roundings, p² four; a term of varentropy is a rounded weight times a rounded square.
        roundings = {"varentropy": 2, "collision_prob": 4}
        for name, own, others, true in zip(truth._fields, fused, eager, truth, strict=True):
            assert own.dtype == torch.float32
            rounding = roundings.get(name, 1) * torch.finfo(torch.float32).eps * max(true.abs().max().item(), 1)
            assert_no_worse(name, own, others, true, rounding)
        return fused

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [1, 2, 1000, 4097])
    def test_distribution_statistics(self, vocab, dtype):
        self.check_distribution(3 * torch.randn(2, 4, vocab).to(dtype))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"logit_softcap": 3.0},
            {"logit_scale": -1.5},
            {"vocab_size": 250},
            {"temperature": torch.linspace(0.5, 2.0, 15).view(3, 5)},
        ],
    )
    @pytest.mark.parametrize("kind", ["rows", "vocab", "time"])
    def test_distribution_statistics_of_other_rows(self, kind, arguments):
        self.check_distribution(as_strided(3 * torch.randn(3, 5, 301), kind), **arguments)

    def test_distribution_statistics_of_masked_and_impossible_tokens(self):
        logits = torch.randn(1, 5, 300)
        logits[0, 0, 10:] = -INF
        logits[0, 1] = math.nan  # masked
        logits[0, 2] = -INF
        logits[0, 3, 7] = math.nan
        logits[0, 4, 7] = INF
        mask = torch.tensor([[True, False, True, True, True]])
        first = self.check_distribution(logits[:, :2], mask=mask[:, :2])
        assert all((values[0, 1] == 0).all() for values in first)
        rest = ek.distribution_statistics(logits.to(self.device), mask=mask.to(self.device), backend=self.backend)
        assert all(values[0, 2:].isnan().all() for values in rest)

    def test_distributions_that_are_known(self):
        uniform, certain, two = torch.zeros(8), torch.full((8,), -INF), torch.full((8,), -INF)
        certain[3], two[:2] = 1.0, 5.0
        logits = torch.stack([uniform, certain, two])[None].to(self.device)
        got = torch.stack(ek.distribution_statistics(logits, backend=self.backend))[:, 0].cpu()
        expected = [[math.log(8), 0.0, math.log(2)], [0.0] * 3, [1 / 8, 1.0, 1 / 2], [1 / 8, 1.0, 1 / 2]]
        assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)

    def test_distribution_statistics_of_no_tokens(self):
        for shape in ((0, 7), (3, 0, 7)):
            got = ek.distribution_statistics(torch.empty(shape, device=self.device), backend=self.backend)
            assert all(values.shape == shape[:-1] for values in got)

    def test_distribution_statistics_of_a_head(self):
        hidden, weight = torch.randn(2, 6, 16), torch.randn(50, 16)
        mask = torch.rand(2, 6) > 0.3
        arguments = {"mask": mask.to(self.device), "backend": self.backend, "max_chunk_bytes": 3 * 50 * 4}
        got = ek.linear_distribution_statistics(hidden.to(self.device), weight.to(self.device), **arguments)
        expected = ek.distribution_statistics(hidden @ weight.T, mask=mask, backend="reference")
        assert_close([*map(torch.Tensor.cpu, got)], [*expected], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("vocab", "rounding"), [(600, 0.0), (9001, 1e-6)])
    def test_scoring_agrees_with_training(self, vocab, rounding):
        """The same bits below 16 KB a row. From there on a GPU trains and scores with different kernels, which add up
        a row in different orders, so float32 roundings differ."""
        case = moved(busy_case(vocab=vocab), self.device)
        with torch.no_grad():
            scored = ek.epo_loss(**case, backend=self.backend)
            log_probs, entropy = ek.log_probs_and_entropy(
                case["logits"], case["tokens"], mask=case["mask"], backend=self.backend
            )
        out, _ = self.run(case)
        assert not scored.loss.requires_grad
        assert_close(scored.loss, out.loss.detach(), rtol=rounding, atol=rounding)
        assert_close(scored.metrics.values, out.metrics.values, rtol=rounding, atol=rounding)
        assert_close(log_probs, out.log_probs, rtol=1e-6, atol=1e-6)
        assert_close(entropy, out.entropy, rtol=1e-6, atol=1e-6)
