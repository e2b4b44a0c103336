"""The loss in plain Python, for the tests: float64, a loop over the tokens, gradients by hand, nothing of the library.

`epo_loss` takes what the library's takes and returns what it must return. Masked tokens are passed over, never read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import torch


def softmax_row(row, vocab_size, temperature, softcap, scale):
    """(p, log p, ∂z/∂x) of one row of raw logits x, lists of vocab_size."""
    z, slope = [], []
    for x in row[:vocab_size]:
        value, rate = x, 1.0
        if scale is not None:
            value, rate = scale * value, scale
        if softcap is not None:
            bent = math.tanh(value / softcap)
            value, rate = softcap * bent, rate * (1.0 - bent * bent)
        z.append(value / temperature)
        slope.append(rate / temperature)
    top = max(z)
    log_total = math.log(math.fsum(math.exp(value - top) for value in z))
    log_p = [value - top - log_total for value in z]
    return [math.exp(value) for value in log_p], log_p, slope


def clamp(value, low, high):
    return math.nan if math.isnan(value) else min(max(value, low), high)


def importance_ratio(i, deltas, cfg):
    """(ratio, {token: ∂ratio/∂log_prob}) of token i, shared with the tokens of deltas."""
    mean = sum(deltas.values()) / len(deltas)
    ratio = math.exp(clamp(mean, -20.0, 20.0))
    slope = ratio if -20.0 <= mean <= 20.0 else 0.0
    if cfg.ratio_gradient == "token":
        return ratio, {i: slope}
    return ratio, {j: slope / len(deltas) for j in deltas}


def clipped_loss(advantage, ratio, cfg):
    """(pg, ∂pg/∂ratio, clipped, dual clipped) of one token."""
    pg, slope = -advantage * ratio, -advantage
    bounded = -advantage * clamp(ratio, 1.0 - cfg.clip_ratio_low, 1.0 + cfg.clip_ratio_high)
    clipped = bounded > pg
    if clipped:
        pg, slope = bounded, 0.0
    dual_clipped = cfg.clip_ratio_c is not None and advantage < 0 and -advantage * cfg.clip_ratio_c < pg
    if dual_clipped:
        pg, slope = -advantage * cfg.clip_ratio_c, 0.0
    return pg, slope, clipped, dual_clipped


def outside_trust_region(log_prob, old, advantage, cfg):
    p, o = math.exp(log_prob), math.exp(old)
    limit = cfg.clip_ratio_high if advantage > 0 else cfg.clip_ratio_low
    moved = p - o if advantage > 0 else o - p
    if cfg.dppo_divergence == "tv":
        return moved > limit
    not_o, not_p = max(1 - o, 0.0), max(1 - p, 0.0)
    divergence = o * (old - log_prob) + not_o * math.log((not_o + 1e-8) / (not_p + 1e-8))
    return moved > 0 and divergence > limit


def vespo_weight(deltas, factors, advantage, cfg):
    """φ of a sequence's weight, for a token of that advantage."""
    log_w = 0.0
    for j, delta in deltas.items():
        log_factor = math.log(factors[j]) if factors[j] > 0 else -math.inf
        log_w += clamp(delta, -20.0, 20.0) + clamp(log_factor, math.log(1e-8), 20.0)
    log_w = clamp(log_w, math.log(1e-8), 20.0)
    positive = advantage >= 0
    k = cfg.vespo_k_pos if positive else cfg.vespo_k_neg
    lam = cfg.vespo_lambda_pos if positive else cfg.vespo_lambda_neg
    return math.exp(k * log_w + lam * (1 - math.exp(log_w)))


def gmpo_loss(deltas, advantages, cfg):
    """(pg, {token: ∂pg/∂log_prob}, the clipped tokens) of a sequence."""
    steps, clipped = {}, set()
    for j, delta in deltas.items():
        if advantages[j] > 0 and delta > cfg.clip_ratio_high:
            steps[j] = cfg.clip_ratio_high
            clipped.add(j)
        elif advantages[j] < 0 and delta < -cfg.clip_ratio_low:
            steps[j] = -cfg.clip_ratio_low
            clipped.add(j)
        else:
            steps[j] = delta if advantages[j] else 0.0
    mean = sum(steps.values()) / len(steps)
    pg = -sum(advantages[j] for j in deltas) / len(deltas) * math.exp(clamp(mean, -20.0, 20.0))
    slope = pg / len(deltas) if -20.0 <= mean <= 20.0 else 0.0
    return pg, {j: slope for j in deltas if j not in clipped and advantages[j]}, clipped


def policy_loss(i, members, log_probs, old, advantages, factors, cfg):
    """pg of token i with its factor, {token: ∂pg/∂log_prob}, and what belongs to its ratio; old None: on-policy."""
    name, advantage, log_prob, factor = cfg.policy_loss, advantages[i], log_probs[i], factors[i]
    deltas = {j: 0.0 if old[j] is None else log_probs[j] - old[j] for j in members}
    own = {i: deltas[i]}
    ratio, dratio = importance_ratio(i, own if name in ("vespo", "gmpo") else deltas, cfg)
    clipped = dual_clipped = False
    if name in ("ppo", "gspo"):
        pg, slope, clipped, dual_clipped = clipped_loss(advantage, ratio, cfg)
        slopes = {j: slope * d for j, d in dratio.items()}
    elif name == "cispo":
        bounded = clamp(ratio, 1.0 - cfg.clip_ratio_low, 1.0 + cfg.clip_ratio_high)
        pg, slopes, clipped = -bounded * advantage * log_prob, {i: -bounded * advantage}, bounded != ratio
    elif name == "sapo":
        tau = cfg.sapo_tau_pos if advantage > 0 else cfg.sapo_tau_neg
        gate = 1.0 / (1.0 + math.exp(-clamp(tau * (ratio - 1.0), -700.0, 700.0)))
        pg, slope = -advantage * gate * 4.0 / tau, -advantage * 4.0 * gate * (1.0 - gate)
        slopes = {j: slope * d for j, d in dratio.items()}
    elif name == "reinforce":
        pg, slopes = -advantage * log_prob, {i: -advantage}
    elif name == "dppo":
        bounded = ratio if cfg.clip_ratio_c is None else min(ratio, cfg.clip_ratio_c)
        clipped = old[i] is not None and outside_trust_region(log_prob, old[i], advantage, cfg)
        dual_clipped = not clipped and bounded < ratio
        pg, slopes = (0.0, {}) if clipped else (-bounded * advantage * log_prob, {i: -bounded * advantage})
    elif name == "vespo":
        phi, factor = vespo_weight(deltas, factors, advantage, cfg), 1.0
        pg, slopes = -phi * advantage * log_prob, {i: -phi * advantage}
    else:
        pg, slopes, at = gmpo_loss(deltas, advantages, cfg)
        clipped = i in at
    return SimpleNamespace(
        pg=factor * pg,
        slopes={j: factor * slope for j, slope in slopes.items()},
        log_ratio=clamp(deltas[i], -20.0, 20.0),
        ratio=ratio,
        ratio_slopes=dratio,
        clipped=clipped,
        dual_clipped=dual_clipped,
    )


def kl_estimate(log_prob, ref, kl_type):
    """(KL, ∂KL/∂log_prob) of one token."""
    d = log_prob - ref
    if kl_type == "k1":
        return d, 1.0
    if kl_type == "abs":
        return abs(d), math.copysign(1.0, d) if d else 0.0
    if kl_type == "k2":
        return d * d / 2, d
    exponent = min(max(-d, -20.0), 20.0)
    value = math.exp(exponent) - exponent - 1.0
    if value > 10.0:
        return 10.0, 0.0
    return value, (1.0 - math.exp(exponent)) if -20.0 <= -d <= 20.0 else 0.0


def penalty_of(entropy, lower, upper, cfg):
    """(P, ∂P/∂H, gate) at one entropy, of a token or of a segment's mean."""
    below, above = max(lower - entropy, 0.0), max(entropy - upper, 0.0)
    outside = not (lower < entropy < upper)
    alpha = cfg.penalty_alpha
    if cfg.penalty == "hinge":
        return alpha * (below + above), alpha * ((above > 0) - (below > 0)), 1.0
    if cfg.penalty == "quadratic":
        return alpha * (below**2 + above**2), 2 * alpha * (above - below), 1.0
    if cfg.penalty == "indicator":
        return (alpha if outside else 0.0), 0.0, 1.0
    return 0.0, 0.0, (alpha if cfg.penalty == "gate" and outside else 1.0)


def token_weights(mask, sequences, mode, normalizer, max_length, loss_scale):
    """w of each token, lists throughout."""
    lengths = defaultdict(int)
    for sequence, counted in zip(sequences, mask, strict=True):
        lengths[sequence] += counted
    total = sum(lengths.values()) if mode == "token-mean" else sum(n > 0 for n in lengths.values())
    total = total if normalizer is None else normalizer
    weights = []
    for sequence, counted in zip(sequences, mask, strict=True):
        per_token = {"seq-mean-token-mean": lengths[sequence], "seq-mean-token-sum-norm": max_length}.get(mode, 1)
        weights.append(loss_scale / (total * per_token) if counted else 0.0)
    return weights


def epo_loss(
    logits,
    tokens,
    old_log_probs,
    advantages,
    mask,
    cfg,
    *,
    entropy_bounds=None,
    segment_ids=None,
    cu_seqlens=None,
    max_length=None,
    penalty_weight=1.0,
    entropy_coeff=None,
    kl_coeff=None,
    ref_log_probs=None,
    is_weights=None,
    temperature=None,
    normalizer=None,
    loss_scale=1.0,
    vocab_size=None,
    logit_softcap=None,
    logit_scale=None,
):
    """loss, gradient (like logits), log_probs, entropy (like tokens), a, b (flat), and metrics by their names."""
    shape, count = tokens.shape, tokens.numel()
    sequences = _sequences(tokens, cu_seqlens)

    def spread(value):  # like tokens, or one per sequence
        if value is None:
            return [None] * count
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return [float(value)] * count
        flat = value.detach().double().reshape(-1).tolist()
        return flat if value.shape == shape else [flat[sequence] for sequence in sequences]

    rows = logits.detach().double().reshape(count, -1).tolist()
    labels = tokens.reshape(-1).tolist()
    counted = [bool(m) for m in mask.reshape(-1).tolist()]
    old, advantage, ref, factor = map(spread, (old_log_probs, advantages, ref_log_probs, is_weights))
    factor = [1.0 if value is None else value for value in factor]
    tau = spread(cfg.temperature if temperature is None else temperature)
    lam = float(cfg.entropy_coeff if entropy_coeff is None else entropy_coeff)
    beta_k = float(penalty_weight) * cfg.smooth_coeff
    kl_weight = float(cfg.kl_coeff if kl_coeff is None else kl_coeff)
    vocab_size = vocab_size or len(rows[0])
    weights = token_weights(
        counted,
        sequences,
        cfg.loss_agg_mode,
        None if normalizer is None else float(normalizer),
        max_length or shape[-1],
        float(loss_scale),
    )

    active = [i for i in range(count) if counted[i]]
    p, log_p, slope, log_probs, entropy = {}, {}, {}, [0.0] * count, [0.0] * count
    for i in active:
        p[i], log_p[i], slope[i] = softmax_row(rows[i], vocab_size, tau[i], logit_softcap, logit_scale)
        log_probs[i] = log_p[i][labels[i]]
        entropy[i] = -math.fsum(q * lq for q, lq in zip(p[i], log_p[i], strict=True) if q > 0)

    bands = _bands(entropy_bounds, segment_ids, cfg.band_scope, shape, sequences, active, spread)
    held = _held(entropy, segment_ids, cfg.band_scope, sequences, active)
    sharing = _members(segment_ids, cfg.ratio_unit, sequences, active)

    metrics = defaultdict(float)
    a, b = [0.0] * count, [0.0] * count
    for i in active:
        policy = policy_loss(i, sharing[i], log_probs, old, advantage, factor, cfg)
        kl, dkl = (0.0, 0.0) if ref[i] is None else kl_estimate(log_probs[i], ref[i], cfg.kl_type)
        kl_slopes = {i: dkl}
        if cfg.kl_bias_correction:
            kl_slopes = {j: kl * slope for j, slope in policy.ratio_slopes.items()}
            kl_slopes[i] = kl_slopes.get(i, 0.0) + policy.ratio * dkl
            kl = policy.ratio * kl
        lower, upper = bands[i]
        mean, members = held[i]
        penalty, dpenalty, gate = penalty_of(mean, lower, upper, cfg)
        total = policy.pg - lam * (gate * entropy[i] - beta_k * penalty) + (kl_weight * kl if kl_weight else 0.0)
        for j, derivative in policy.slopes.items():
            a[j] += weights[i] * derivative
        for j, derivative in kl_slopes.items():
            a[j] += weights[i] * kl_weight * derivative if kl_weight else 0.0
        b[i] += -lam * gate * weights[i]
        for j in members:
            b[j] += lam * beta_k * weights[i] * dpenalty / len(members)
        for name, value in {
            "tokens": 1.0,
            "loss": weights[i] * total,
            "pg_loss": weights[i] * policy.pg,
            "penalty": weights[i] * penalty,
            "kl_loss": weights[i] * kl,
            "entropy_sum": entropy[i],
            "log_prob_sum": log_probs[i],
            "ratio_sum": policy.ratio,
            "ppo_kl_sum": -policy.log_ratio,
            "clipped_tokens": policy.clipped,
            "dual_clipped_tokens": policy.dual_clipped,
            "below_band_tokens": mean < lower,
            "above_band_tokens": mean > upper,
            "nonfinite_tokens": not (math.isfinite(total) and math.isfinite(entropy[i])),
        }.items():
            metrics[name] += value
    metrics["sequences"] = len({sequences[i] for i in active})

    gradient = torch.zeros(count, len(rows[0]) if rows else 0, dtype=torch.float64)
    for i in active:
        for v in range(vocab_size):
            bonus = p[i][v] * (log_p[i][v] + entropy[i]) if p[i][v] > 0 else 0.0
            gradient[i, v] = slope[i][v] * (a[i] * ((v == labels[i]) - p[i][v]) - b[i] * bonus)
    return SimpleNamespace(
        loss=metrics["loss"],
        gradient=gradient.reshape(logits.shape),
        log_probs=torch.tensor(log_probs, dtype=torch.float64).reshape(shape),
        entropy=torch.tensor(entropy, dtype=torch.float64).reshape(shape),
        a=a,
        b=b,
        weights=weights,
        metrics=metrics,
    )


def _sequences(tokens, cu_seqlens):
    """Sequence of each token, flat."""
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        return [s for s in range(len(borders) - 1) for _ in range(borders[s + 1] - borders[s])]
    width = tokens.shape[-1]
    return [i // width if tokens.dim() == 2 else 0 for i in range(tokens.numel())]


def _segments(segment_ids, sequences):
    return sequences if segment_ids is None else segment_ids.reshape(-1).tolist()


def _members(segment_ids, scope, sequences, active):
    """For each counted token: the counted tokens that share a statistic with it."""
    if scope == "token":
        return {i: [i] for i in active}
    groups, members = sequences if scope == "sequence" else _segments(segment_ids, sequences), defaultdict(list)
    for i in active:
        members[groups[i]].append(i)
    return {i: members[groups[i]] for i in active}


def _held(entropy, segment_ids, scope, sequences, active):
    """For each counted token: the entropy compared with the band, and the tokens that share it."""
    members = _members(segment_ids, scope, sequences, active)
    return {i: (math.fsum(entropy[j] for j in at) / len(at), at) for i, at in members.items()}


def _bands(bounds, segment_ids, scope, shape, sequences, active, spread):
    """(lower, upper) of each counted token."""
    if bounds is None:
        return dict.fromkeys(active, (-math.inf, math.inf))
    segments = _segments(segment_ids, sequences)
    if segment_ids is not None and bounds[0].dim() == 1 and bounds[0].shape != shape:
        lower, upper = bounds[0].double().tolist(), bounds[1].double().tolist()
        return {i: (lower[segments[i]], upper[segments[i]]) for i in active}
    lower, upper = spread(bounds[0]), spread(bounds[1])
    if scope == "token":
        return {i: (lower[i], upper[i]) for i in active}
    tightest = {segments[i]: (-math.inf, math.inf) for i in active}
    for i in active:
        low, high = tightest[segments[i]]
        tightest[segments[i]] = (max(low, lower[i]), min(high, upper[i]))
    return {i: tightest[segments[i]] for i in active}
