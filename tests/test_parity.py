"""Equal to verl 0.9 and to the published EPO code, whose formulas are written out here.

verl works on log-prob and entropy matrices (sequences, time); its formulas below are plain loops over such matrices.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.integrations.verl_keys import EPOSettings
from tests.cases import MODES, random_case, run

F64 = {"dtype": torch.float64}


def matrices(case):
    """(log-prob, entropy) lists by sequence, from the logits."""
    log_p = (case["logits"] / case["cfg"].temperature).log_softmax(-1)
    taken = log_p.gather(-1, case["tokens"][..., None]).squeeze(-1)
    return taken.tolist(), (-(log_p.exp() * log_p).sum(-1)).tolist()


def aggregated(matrix, mask, mode, horizon):
    """verl's agg_loss: sums over sequences first; sequences without a token count nowhere."""
    kept = [[v for v, m in zip(row, counted, strict=True) if m] for row, counted in zip(matrix, mask, strict=True)]
    sums = [math.fsum(row) for row in kept]
    counts = [sum(row) for row in mask]
    if mode == "token-mean":
        return math.fsum(sums) / sum(counts)
    alive = sum(count > 0 for count in counts)
    if mode == "seq-mean-token-mean":
        return math.fsum(total / (count + 1e-8) for total, count in zip(sums, counts, strict=True) if count) / alive
    return math.fsum(sums) / alive / (horizon if mode == "seq-mean-token-sum-norm" else 1)


def vanilla(log_prob, old, advantage, cfg):
    """verl's compute_policy_loss ("vanilla") at one token: loss, clipped, clipped below, -Δ."""
    delta = max(-20.0, min(20.0, log_prob - old))
    ratio = math.exp(delta)
    clipped_ratio = max(1 - cfg.clip_ratio_low, min(1 + cfg.clip_ratio_high, ratio))
    plain, clipped = -advantage * ratio, -advantage * clipped_ratio
    worst, floor = max(plain, clipped), -advantage * cfg.clip_ratio_c
    loss = min(floor, worst) if advantage < 0 else worst
    return loss, clipped > plain, advantage < 0 and worst > floor, -delta


def low_var_kl(log_prob, ref):
    delta = max(-20.0, min(20.0, ref - log_prob))
    return max(-10.0, min(10.0, math.exp(delta) - delta - 1))


def by_token(function, *matrices):
    return [[function(*values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_and_its_metrics_equal_verls(mode, seed):
    cfg = ek.EPOConfig(
        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.8, loss_agg_mode=mode, entropy_coeff=0.01,
        kl_coeff=0.05, temperature=0.9,
    )  # fmt: skip
    case = random_case(cfg, seed=seed, batch=5, time=6)
    case["old_log_probs"][0, 0] += 300.0
    case["ref_log_probs"][0, 0] += 300.0
    case["advantages"][1] = -case["advantages"][1].abs()
    log_probs, entropy = matrices(case)
    mask, old, advantages = (case[name].tolist() for name in ("mask", "old_log_probs", "advantages"))
    tokens = by_token(lambda *values: vanilla(*values, cfg), log_probs, old, advantages)
    loss, clipped, clipped_below, minus_delta = ([[t[i] for t in row] for row in tokens] for i in range(4))
    kl = by_token(low_var_kl, log_probs, case["ref_log_probs"].tolist())
    pg_loss, kl_loss, entropy_loss = (aggregated(matrix, mask, mode, 6) for matrix in (loss, kl, entropy))

    out, _ = run(case)
    floats = out.metrics.to_floats()
    close = {"rel": 1e-7}  # verl's seq-mean-token-mean divides by n + 1e-8
    assert floats["pg_loss"] == pytest.approx(pg_loss, **close)
    assert floats["kl_loss"] == pytest.approx(kl_loss, **close)
    assert out.loss.item() == pytest.approx(pg_loss - 0.01 * entropy_loss + 0.05 * kl_loss, **close)
    # verl's masked means: over tokens, in every mode
    assert floats["pg_clipfrac"] == pytest.approx(aggregated(clipped, mask, "token-mean", 6))
    assert floats["pg_clipfrac_lower"] == pytest.approx(aggregated(clipped_below, mask, "token-mean", 6))
    assert floats["ppo_kl"] == pytest.approx(aggregated(minus_delta, mask, "token-mean", 6))


def test_the_parity_cases_clip_on_every_side():
    totals = ek.LossMetrics(torch.zeros(len(ek.metrics.METRIC_NAMES), **F64))
    for seed in range(4):
        totals += run(random_case(ek.EPOConfig(clip_ratio_c=1.8), seed=seed, batch=5, time=6))[0].metrics
    assert totals.clipped_tokens > 10
    assert totals.dual_clipped_tokens > 3


def test_rollout_importance_weights_multiply_the_policy_loss_alone():
    cfg = ek.EPOConfig(entropy_coeff=0.01)
    case = random_case(cfg, is_weights=torch.rand(3, 5, **F64))
    log_probs, entropy = matrices(case)
    lists = (log_probs, case["old_log_probs"].tolist(), case["advantages"].tolist(), case["is_weights"].tolist())
    loss = by_token(lambda lp, old, a, w: vanilla(lp, old, a, cfg)[0] * w, *lists)
    mask = case["mask"].tolist()
    expected = aggregated(loss, mask, "token-mean", 5) - 0.01 * aggregated(entropy, mask, "token-mean", 5)
    assert run(case)[0].loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_dividing_by_global_numbers_equals_verls_data_parallel_loss(mode):
    # verl on rank r of d: agg_loss over global numbers times d, then the gradients' mean over ranks.
    cfg = ek.EPOConfig(loss_agg_mode=mode)
    case = random_case(cfg, batch=4)
    whole, gradient = run(case)
    number = whole.metrics.tokens if mode == "token-mean" else whole.metrics.sequences
    ranks = []
    for rows in (slice(0, 3), slice(3, 4)):
        part = {name: value[rows] for name, value in case.items() if name != "cfg"}
        ranks.append(run({**part, "cfg": cfg, "normalizer": number, "loss_scale": 2.0}))
    assert_close(sum(out.loss for out, _ in ranks) / 2, whole.loss, rtol=1e-12, atol=0)
    assert_close(torch.cat([part for _, part in ranks]) / 2, gradient, rtol=1e-12, atol=1e-15)


# ---- the published EPO code -----------------------------------------------------------------------------------------


def published_loss(case, history, turns, beta, low=0.8, high=1.2):
    """pg - λ (agg(H) - k agg(βP)) + kl_coeff agg(KL), P = α unless strictly between κ_l H̄ and κ_r H̄ of the turn."""
    cfg, mode, mask = case["cfg"], case["cfg"].loss_agg_mode, case["mask"].tolist()
    log_probs, entropy = matrices(case)
    pg = by_token(
        lambda *v: vanilla(*v, cfg)[0], log_probs, case["old_log_probs"].tolist(), case["advantages"].tolist()
    )
    kl = by_token(low_var_kl, log_probs, case["ref_log_probs"].tolist())

    def outside(value, turn):
        return 0.0 if low * history[turn] < value < high * history[turn] else beta * cfg.penalty_alpha

    penalty = by_token(outside, entropy, turns.tolist())
    pg, kl, bonus, penalty = (aggregated(matrix, mask, mode, 5) for matrix in (pg, kl, entropy, penalty))
    return pg - cfg.entropy_coeff * (bonus - cfg.smooth_coeff * penalty) + cfg.kl_coeff * kl


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env", ["scienceworld", "alfworld"])
def test_the_published_loss(env, mode):
    preset = ek.EPOConfig.published_code(env)
    cfg = ek.EPOConfig(**{**vars(preset), "loss_agg_mode": mode, "entropy_coeff": 0.5})
    means = [1.0, 1.2, 1.4]
    history = ek.EntropyHistory(3, weighting="step")
    history.update(torch.arange(3), torch.tensor(means, **F64), torch.ones(3))
    history.commit()
    turns = torch.arange(5).expand(3, 5) // 2
    beta = ek.phase_weight(60, 150, "official")
    case = random_case(cfg, seed=2, penalty_weight=beta)
    case["entropy_bounds"] = history.bounds(turns, 0.8, 1.2)
    out, _ = run(case)
    assert 0 < out.metrics.below_band_tokens + out.metrics.above_band_tokens < out.metrics.tokens
    assert out.loss.item() == pytest.approx(published_loss(case, means, turns, beta), rel=1e-7)


@pytest.mark.parametrize(
    "turns",
    [torch.arange(5).expand(3, 5) // 2, torch.arange(3)[:, None].expand(3, 5)],
    ids=["turns of a response", "one sample per turn"],
)
def test_the_documented_keys_give_the_published_loss(turns):
    """The table of docs/verl.md, read from the page, in both layouts of turns."""
    page = (Path(__file__).parents[1] / "docs" / "verl.md").read_text()
    table = page.split("## Moving from")[1]
    written = dict(re.findall(r"`policy_loss\.epo\.(\w+)=([\w.]+)`", table))
    types = {"band_low": float, "band_high": float, "penalty_alpha": float, "smooth_coeff": float}
    types |= {"num_turns": int, "phase_horizon": int}
    settings = EPOSettings.of({key: types.get(key, str)(value) for key, value in written.items()})
    shared = {key: getattr(settings, key) for key in ("penalty", "penalty_alpha", "smooth_coeff", "band_scope")}
    history = settings.make_history()
    for step in ([0.4, 0.6, 0.6], [0.6, 0.6, 0.8]):
        history.update(torch.arange(3), torch.tensor(step, **F64), torch.ones(3))
        history.commit()
    beta = ek.phase_weight(60, settings.phase_horizon, settings.phase_schedule)
    case = random_case(ek.EPOConfig(entropy_coeff=0.5, kl_coeff=0.01, **shared), seed=2, penalty_weight=beta)
    case["entropy_bounds"] = history.bounds(turns, settings.band_low, settings.band_high)
    out, _ = run(case)
    assert 0 < out.metrics.above_band_tokens < out.metrics.tokens
    case["cfg"] = ek.EPOConfig(**{**vars(ek.EPOConfig.published_code("scienceworld")), "entropy_coeff": 0.5})
    expected = published_loss(case, [0.5, 0.6, 0.7], turns, 1 - 0.2 * (1 - math.exp(-2 * 60 / 75)), 0.0, 2.0)
    assert out.loss.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("band_scope", ["token", "segment"])
def test_the_indicators_gradient_is_the_bonus_alone_bit_for_bit(dtype, band_scope):
    case = random_case(ek.EPOConfig.published_code(), dtype=dtype)
    cfg = ek.EPOConfig(**{**vars(case["cfg"]), "band_scope": band_scope, "entropy_coeff": 0.5})
    with_penalty, gradient = run({**case, "cfg": cfg})
    alone, alone_gradient = run({**case, "cfg": ek.EPOConfig(**{**vars(cfg), "penalty": "none"})})
    assert torch.equal(gradient, alone_gradient)
    assert with_penalty.loss > alone.loss
    assert with_penalty.metrics.penalty > 0


@pytest.mark.parametrize(
    ("strength", "above", "below"),
    [
        (0.1, 0.9, 1.1),  # the paper's own: α β k = 0.05 * 2 shrinks the bonus above the band, and never reverses it
        (0.5, 0.5, 1.5),
        (1.0, 0.0, 2.0),
        (2.0, -1.0, 3.0),  # restoring: above the band entropy is pushed down
    ],
)
def test_what_the_hinge_does(strength, above, below):
    """The bonus's gradient is multiplied by 1 - αβk above the band, by 1 + αβk below, and left alone inside."""
    paper = ek.EPOConfig.paper()
    case = random_case(paper, kl_coeff=0.0, advantages=torch.zeros(3, 5, **F64), penalty_weight=2.0)
    case["cfg"] = ek.EPOConfig(**{**vars(paper), "penalty_alpha": strength / 2})
    bonus = run({**case, "cfg": ek.EPOConfig(entropy_coeff=0.001, penalty="none")})[1]
    entropy = run(case)[0].entropy
    for (lower, upper), factor in {(0.0, -1e-3): above, (1e-3, 9.0): below, (-1e-3, 1e-3): 1.0}.items():
        bounds = (torch.zeros_like(entropy) if lower == 0 else entropy + lower, entropy + upper)
        gradient = run({**case, "entropy_bounds": bounds})[1]
        assert_close(gradient, factor * bonus, rtol=1e-9, atol=1e-15)
