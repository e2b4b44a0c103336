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


def clipped_loss(log_prob, old, advantage, cfg):
    """(pg, ∂pg/∂log_prob, log ratio, clipped, dual clipped) of one token; old None: on-policy."""
    difference = 0.0 if old is None else log_prob - old
    log_ratio = min(max(difference, -20.0), 20.0)
    ratio = math.exp(log_ratio)
    pg = -advantage * ratio
    slope = pg if -20.0 <= difference <= 20.0 else 0.0
    bounded = -advantage * min(max(ratio, 1.0 - cfg.clip_ratio_low), 1.0 + cfg.clip_ratio_high)
    clipped = bounded > pg
    if clipped:
        pg, slope = bounded, 0.0
    dual_clipped = cfg.clip_ratio_c is not None and advantage < 0 and -advantage * cfg.clip_ratio_c < pg
    if dual_clipped:
        pg, slope = -advantage * cfg.clip_ratio_c, 0.0
    return pg, slope, log_ratio, clipped, dual_clipped


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

    def spread(value):  # like tokens, or one a sequence
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

    metrics = defaultdict(float)
    a, b = [0.0] * count, [0.0] * count
    for i in active:
        pg, dpg, log_ratio, clipped, dual_clipped = clipped_loss(log_probs[i], old[i], advantage[i], cfg)
        kl, dkl = (0.0, 0.0) if ref[i] is None else kl_estimate(log_probs[i], ref[i], cfg.kl_type)
        lower, upper = bands[i]
        mean, members = held[i]
        penalty, dpenalty, gate = penalty_of(mean, lower, upper, cfg)
        total = factor[i] * pg - lam * (gate * entropy[i] - beta_k * penalty) + kl_weight * kl
        a[i] = weights[i] * (factor[i] * dpg + kl_weight * dkl)
        b[i] += -lam * gate * weights[i]
        for j in members:
            b[j] += lam * beta_k * weights[i] * dpenalty / len(members)
        for name, value in {
            "tokens": 1.0,
            "loss": weights[i] * total,
            "pg_loss": weights[i] * factor[i] * pg,
            "penalty": weights[i] * penalty,
            "kl_loss": weights[i] * kl,
            "entropy_sum": entropy[i],
            "log_prob_sum": log_probs[i],
            "ratio_sum": math.exp(log_ratio),
            "ppo_kl_sum": -log_ratio,
            "clipped_tokens": clipped,
            "dual_clipped_tokens": dual_clipped,
            "below_band_tokens": mean < lower,
            "above_band_tokens": mean > upper,
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


def _held(entropy, segment_ids, scope, sequences, active):
    """For each counted token: the entropy held against the band, and the tokens that share in it."""
    if scope == "token":
        return {i: (entropy[i], [i]) for i in active}
    segments, members = _segments(segment_ids, sequences), defaultdict(list)
    for i in active:
        members[segments[i]].append(i)
    means = {segment: math.fsum(entropy[i] for i in at) / len(at) for segment, at in members.items()}
    return {i: (means[segments[i]], members[segments[i]]) for i in active}


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
