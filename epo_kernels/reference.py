"""The maths in eager PyTorch: one function per term, differentiated by autograd, in float32 or float64.

Every other backend is tested against this file. Per token, with logits z, sampled token y and mask m:

    log_prob = z_y - lse(z)        H = -Σ_v p_v log p_v        r = exp(clamp(log_prob - old_log_prob, ±20))
    pg       = the policy loss: for "ppo" max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high));  where A < 0: min(pg, -A c)
    ℓ        = is_weight pg - λ (H - β k P) + kl_coeff KL        (KL times r with kl_bias_correction)
    loss     = Σ_i w_i ℓ_i

The formulas of the other policy losses are above their functions below. Losses with a sequence statistic share it among
the counted tokens of a sequence or segment (`EPOConfig.ratio_scope`). The metrics count, for each loss:

    policy_loss   clipped_tokens                      dual_clipped_tokens     ratio_sum
    ppo           the clipped ratio decides the loss  the dual clip decides   Σ r
    cispo         the ratio is outside its bounds     0                       Σ r; Σ s with a wider ratio_scope
    sapo          0                                   0                       Σ r; Σ s with a wider ratio_scope
    reinforce     0                                   0                       Σ r
    dppo          outside the trust region            inside it, and r > c    Σ r
    gspo          the clipped ratio decides the loss  the dual clip decides   Σ s
    vespo         0                                   0                       Σ r
    gmpo          the token's log-ratio is clipped    0                       Σ r

where s is the ratio of the token's sequence. ppo_kl_sum is Σ -clamp(log_prob - old_log_prob, ±20) for every loss.

Edge cases, handled identically by every backend:

- A token whose mask is 0 is never read, in any argument; its results are 0 and its gradient is exactly 0.
- p_v = 0 (z_v = -inf) adds exactly 0 to H and to the gradient. If a row of z is entirely -inf, or has NaN or +inf, its
  log-prob and entropy are NaN, and so are the loss and the gradient of that row. (A softcap makes ±inf finite.)
- A sampled token with p = 0 has log-prob -inf. Off-policy its ratio is e^-20 without gradient; on-policy its ratio is
  NaN, and so is the loss, which is counted. A sequence ratio averages log-ratios before clamping, so there the ratio of
  the whole sequence is e^-20 without gradient, or NaN. Losses with the log-prob itself as a factor (cispo, reinforce,
  dppo inside its trust region, vespo) are infinite at such a token, or NaN if A is 0, and are counted; unless NaN,
  their gradient is finite.
- Ties: at r = 1 ± ε and at r = c the gradient is the full gradient of the unclipped ratio; the same holds for gmpo at
  log-ratios of ±ε. The exponents of the ratio and of k3 pass their gradient on [-20, 20], inclusive, and none outside;
  k3 itself does so up to a value of 10. The boundary of a trust region belongs to the inside. A = 0 counts as negative
  for sapo and dppo, and as positive for vespo, as in TRL and verl.
- is_weights multiply pg, except for vespo, which includes them in the sequence's weight w. Every token has its own
  advantage: gmpo takes their mean, the other losses use each token's.
- On-policy (old_log_probs is None) every ratio is 1 and no token is clipped. reinforce uses old_log_probs only for the
  metrics.
- A NaN log-ratio makes a sequence statistic NaN, and therefore the loss and the gradient of all counted tokens of that
  sequence. With ratio_gradient="sequence", any NaN loss makes the gradient of its whole sequence NaN.
- Exactly on the bound of the band the penalty and its derivative are 0 (hinge, quadratic); the indicator and the gate
  count the bound as outside.
- A counted token with an inconsistent band (lower > upper, or NaN) has a NaN loss and is counted as invalid.
- A counted token with a NaN loss, whatever the cause (e.g. a NaN old_log_prob), makes the gradient of its row NaN.
- A term whose coefficient is 0 is skipped, not multiplied by 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from epo_kernels.aggregation import sequence_lengths, token_weights
from epo_kernels.config import EPOConfig, KLType, Penalty, PolicyLossName
from epo_kernels.inputs import LogitTransform, LossInputs, Scalar, TokenInputs, compute_dtype
from epo_kernels.metrics import METRIC_NAMES, LossMetrics

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0
DPPO_EPSILON = 1e-8
VESPO_LOWEST_LOG_WEIGHT = math.log(1e-8)


class EPOOutput(NamedTuple):
    """What `epo_loss` returns.

    Attributes:
        loss: 0-d float32 (float64 for float64 logits); `.backward()` computes the gradient of the logits.
        metrics: sums and counts, see `LossMetrics`.
        log_probs: float32 (float64), detached, shaped like tokens; 0 where the mask is 0.
        entropy: like log_probs, in nats.
    """

    loss: Tensor
    metrics: LossMetrics
    log_probs: Tensor
    entropy: Tensor


class PolicyInputs(NamedTuple):
    """Inputs of a policy loss, all (B, T) and 0 where the mask is 0.

    Attributes:
        old_log_probs: as given; on-policy, the detached log_probs.
        groups: the tokens that share a ratio; None if each token has its own.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    is_weights: Tensor | None
    groups: Groups | None


class PolicyLoss(NamedTuple):
    """Per-token policy loss and its logged quantities, all (B, T)."""

    pg: Tensor  # including its importance weight
    log_ratio: Tensor  # per token
    ratio: Tensor  # per token or per sequence, see the table of metrics
    clipped: Tensor
    dual_clipped: Tensor


class Groups(NamedTuple):
    """Groups of counted tokens that share a statistic: rows, or the tokens of equal ids (B, T) in [0, number)."""

    mask: Tensor
    ids: Tensor | None
    number: int

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Number of counted tokens per group, in the dtype of values, and the sum of each of values, (number,) each."""
        columns = [self.mask.to(values[0].dtype), *(torch.where(self.mask, value, 0.0) for value in values)]
        if self.ids is None:
            return tuple(column.sum(dim=1) for column in columns)
        # One scatter for all sums, with a buffer of a unique shape: otherwise Inductor (torch 2.13, CPU) shares the
        # zeros of a scatter between forward and backward, and adds to them twice.
        stacked = torch.stack([column.reshape(-1) for column in columns], dim=1)
        zeros = torch.zeros(self.number, len(columns), dtype=stacked.dtype, device=stacked.device)
        return zeros.index_add(0, self.ids.reshape(-1), stacked).unbind(dim=1)

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Mean of each of values over each group's counted tokens, (number,); 0 for empty groups."""
        counts, *sums = self.sums(*values)
        return tuple(total / counts.clamp(min=1.0) for total in sums)

    def spread(self, values: Tensor) -> Tensor:
        """(number,) -> (B, T)."""
        return values[:, None].expand(self.mask.shape) if self.ids is None else values[self.ids]


def transform_logits(logits: Tensor, transform: LogitTransform) -> Tensor:
    """z of the maths, (B, T, vocab_size): scaled, softcapped, divided by the temperature, in float32 (float64)."""
    z = logits[..., : transform.vocab_size].to(compute_dtype(logits.dtype))
    if transform.scale is not None:
        z = z * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    temperature = transform.temperature
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return z / temperature[..., None]
    return z if not isinstance(temperature, Tensor) and temperature == 1.0 else z / temperature


def log_probs_and_entropy(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution in nats, both (B, T).

    From m = max z, s = Σ e^(z-m), u = Σ (z-m) e^(z-m): log_prob = z_y - m - log s and H = log s - u / s. The maximum
    is subtracted before any rounding, so an offset that the dtype represents exactly changes nothing.
    """
    shifted = z - z.detach().amax(dim=-1, keepdim=True)
    impossible = shifted == float("-inf")
    exps = shifted.exp()
    s = exps.sum(dim=-1)
    u = (shifted.masked_fill(impossible, 0.0) * exps).sum(dim=-1)
    log_s = s.log()
    log_prob = shifted.gather(-1, tokens[..., None]).squeeze(-1) - log_s
    return log_prob, log_s - u / s


def merge_statistics(
    log_probs: Tensor,
    entropy: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    maximum_scale: Scalar,
    owner: Tensor,
    in_vocabulary: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Statistics of whole rows from the statistics of their parts: log_prob, entropy, maximum and sum, each (B, T).

    With c = maximum_scale, the probability of part r is π_r = e^(c (m_r - m)) s_r / s. Then log_prob = log_prob_r +
    log π_r for the part that contains the token, and by the chain rule H = Σ_r π_r (H_r - log π_r), a sum of positive
    terms without cancellation.
    Parts that are entirely -inf have π_r = 0 and add nothing; NaN in any part makes everything NaN.

    Args:
        log_probs, entropy, maximum, total: (parts, B, T), see `RowStatistics`; log_probs are read in the owner only.
        maximum_scale: see `StatisticsKernels.maximum_scale`.
        owner: (B, T) int64, the part that contains the token.
        in_vocabulary: (B, T) bool; log_prob is NaN where it is False.
    """
    whole_maximum = maximum.amax(dim=0)
    shift = maximum_scale * (maximum - whole_maximum)
    weights = shift.exp() * total
    whole_total = weights.sum(dim=0)
    log_share = shift + total.log() - whole_total.log()
    place = owner[None]
    own_share = log_share.gather(0, place)[0]
    # In a part that is entirely -inf the token has no log-prob; in the whole row it is -inf.
    log_prob = torch.where(own_share == float("-inf"), own_share, log_probs.gather(0, place)[0] + own_share)
    log_prob = torch.where(in_vocabulary, log_prob, float("nan"))
    if entropy is None:
        return log_prob, None, whole_maximum, whole_total
    share = weights / whole_total
    entropy = torch.where(share == 0, 0.0, share * (entropy - log_share)).sum(dim=0)
    return log_prob, entropy, whole_maximum, whole_total


def policy_loss(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    """The loss of `cfg.policy_loss`."""
    loss = POLICY_LOSSES[cfg.policy_loss](tokens, cfg)
    if tokens.is_weights is None or cfg.policy_loss == "vespo":
        return loss
    return loss._replace(pg=tokens.is_weights * loss.pg)


def token_log_ratio(tokens: PolicyInputs) -> Tensor:
    """log r = clamp(log_prob - old_log_prob, ±20) of each token."""
    return (tokens.log_probs - tokens.old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(tokens: PolicyInputs, cfg: EPOConfig) -> Tensor:
    """r of each token; with groups, s = exp(clamp(mean of log_prob - old_log_prob, ±20)) of its group.

    With `ratio_gradient="token"` the derivative of s with respect to the token's own log-prob is s, to all others 0.
    """
    if tokens.groups is None:
        return token_log_ratio(tokens).exp()
    mean = tokens.groups.spread(tokens.groups.means(tokens.log_probs - tokens.old_log_probs)[0])
    if cfg.ratio_gradient == "token":
        inside = mean.detach().abs() <= LOG_RATIO_LIMIT
        mean = mean.detach() + torch.where(inside, tokens.log_probs - tokens.log_probs.detach(), 0.0)
    return mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


# pg = max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high));  where A < 0: min(pg, -A c).  gspo: with s in place of r.
def _clipped_ratio_loss(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    advantages, ratio = tokens.advantages, importance_ratio(tokens, cfg)
    unclipped = -advantages * ratio
    # Strict comparisons and `where`: at a tie the whole gradient is that of the unclipped ratio.
    bounded = -advantages * _clip(ratio.detach(), cfg)
    clipped = bounded > unclipped
    pg = torch.where(clipped, bounded, unclipped)
    dual_clipped = torch.zeros_like(clipped)
    if cfg.clip_ratio_c is not None:
        ceiling = -advantages * cfg.clip_ratio_c
        dual_clipped = (advantages < 0) & (ceiling < pg)
        pg = torch.where(dual_clipped, ceiling, pg)
    return PolicyLoss(pg, token_log_ratio(tokens), ratio, clipped, dual_clipped)


# pg = -A sg(clip(r, 1 - ε_low, 1 + ε_high)) log_prob
def _cispo(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    ratio = importance_ratio(tokens, cfg)
    bounded = _clip(ratio.detach(), cfg)
    pg = -bounded * tokens.advantages * tokens.log_probs
    return _policy_loss(tokens, pg, ratio, clipped=bounded != ratio.detach())


# pg = -A 4/τ sigmoid(τ (r - 1)),  τ by the sign of A
def _sapo(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    ratio = importance_ratio(tokens, cfg)
    tau = _choose(tokens.advantages > 0, cfg.sapo_tau_pos, cfg.sapo_tau_neg, ratio.dtype)
    pg = -tokens.advantages * (4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0))
    return _policy_loss(tokens, pg, ratio)


# pg = -A log_prob
def _reinforce(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    return _policy_loss(tokens, -tokens.advantages * tokens.log_probs, importance_ratio(tokens, cfg))


# pg = -A sg(min(r, c)) log_prob, and 0 outside the trust region: with p = exp(log_prob) and o = exp(old_log_prob),
#      tv:  A > 0: p - o > ε_high,  else: o - p > ε_low
#      kl:  o log(o / p) + (1 - o) log((1 - o + 1e-8) / (1 - p + 1e-8)) > ε,
#           A > 0: ε = ε_high and p > o,  else: ε = ε_low and p < o
def _dppo(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    ratio, advantages = importance_ratio(tokens, cfg), tokens.advantages
    p, o = tokens.log_probs.detach().exp(), tokens.old_log_probs.exp()
    # The updates that move a probability in the direction of its advantage. NaN fails the comparison, so it stays in
    # the loss.
    moved = torch.where(advantages > 0, p - o, o - p)
    limit = _choose(advantages > 0, cfg.clip_ratio_high, cfg.clip_ratio_low, p.dtype)
    if cfg.dppo_divergence == "tv":
        outside = moved > limit
    else:
        # Rounding can make a log-prob positive.
        not_o, not_p = (1.0 - o).clamp(min=0.0), (1.0 - p).clamp(min=0.0)
        others = not_o * ((not_o + DPPO_EPSILON) / (not_p + DPPO_EPSILON)).log()
        divergence = o * (tokens.old_log_probs - tokens.log_probs.detach()) + others
        outside = (divergence > limit) & (moved > 0)
    bounded = ratio.detach() if cfg.clip_ratio_c is None else ratio.detach().clamp(max=cfg.clip_ratio_c)
    # 0 * A, so that a NaN advantage makes the loss NaN outside the trust region too.
    pg = torch.where(outside, 0.0 * advantages, -bounded * advantages * tokens.log_probs)
    return _policy_loss(tokens, pg, ratio, clipped=outside, dual_clipped=~outside & (bounded < ratio.detach()))


# pg = -A φ(w) log_prob,  φ(w) = w^k exp(λ (1 - w)),  k and λ by the sign of A,  w of the sequence without gradient:
# log w = clamp(Σ (log r + clamp(log is_weight, log 1e-8, 20)), log 1e-8, 20)
def _vespo(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    assert tokens.groups is not None
    log_ratio = token_log_ratio(tokens)
    steps = log_ratio.detach()
    if tokens.is_weights is not None:
        steps = steps + tokens.is_weights.log().clamp(VESPO_LOWEST_LOG_WEIGHT, LOG_RATIO_LIMIT)
    total = tokens.groups.spread(tokens.groups.sums(steps)[1])
    log_w = total.clamp(VESPO_LOWEST_LOG_WEIGHT, LOG_RATIO_LIMIT)
    positive = tokens.advantages >= 0
    k = _choose(positive, cfg.vespo_k_pos, cfg.vespo_k_neg, log_w.dtype)
    lam = _choose(positive, cfg.vespo_lambda_pos, cfg.vespo_lambda_neg, log_w.dtype)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return _policy_loss(tokens, -phi * tokens.advantages * tokens.log_probs, log_ratio.exp())


# pg = -mean(A) exp(clamp(mean(d), ±20)) over the sequence, of d = min(log r, ε_high) where A > 0, max(log r, -ε_low)
# where A < 0, and 0 where A = 0; log r is not clamped at ±20 here
def _gmpo(tokens: PolicyInputs, cfg: EPOConfig) -> PolicyLoss:
    assert tokens.groups is not None
    advantages, steps = tokens.advantages, tokens.log_probs - tokens.old_log_probs
    too_high = (advantages > 0) & (steps > cfg.clip_ratio_high)
    too_low = (advantages < 0) & (steps < -cfg.clip_ratio_low)
    bound = _choose(too_high, cfg.clip_ratio_high, -cfg.clip_ratio_low, steps.dtype)
    clipped = too_high | too_low
    steps = torch.where(clipped, bound, steps)
    mean_step, mean_advantage = tokens.groups.means((advantages != 0).to(steps.dtype) * steps, advantages)
    ratio = mean_step.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    pg = tokens.groups.spread(-mean_advantage * ratio)
    return _policy_loss(tokens, pg, token_log_ratio(tokens).exp(), clipped=clipped)


POLICY_LOSSES: dict[PolicyLossName, Callable[[PolicyInputs, EPOConfig], PolicyLoss]] = {
    "ppo": _clipped_ratio_loss,
    "cispo": _cispo,
    "sapo": _sapo,
    "reinforce": _reinforce,
    "dppo": _dppo,
    "gspo": _clipped_ratio_loss,
    "vespo": _vespo,
    "gmpo": _gmpo,
}


def _policy_loss(
    tokens: PolicyInputs,
    pg: Tensor,
    ratio: Tensor,
    clipped: Tensor | None = None,
    dual_clipped: Tensor | None = None,
) -> PolicyLoss:
    """A `PolicyLoss` in which nothing is clipped unless given."""
    nowhere = torch.zeros_like(pg, dtype=torch.bool)
    return PolicyLoss(
        pg,
        token_log_ratio(tokens),
        ratio,
        nowhere if clipped is None else clipped,
        nowhere if dual_clipped is None else dual_clipped,
    )


def _clip(ratio: Tensor, cfg: EPOConfig) -> Tensor:
    low, high = 1.0 - cfg.clip_ratio_low, 1.0 + cfg.clip_ratio_high
    return ratio.clamp(low, high)


def _choose(condition: Tensor, first: Scalar, second: Scalar, dtype: torch.dtype) -> Tensor:
    """first where the condition holds, otherwise second, in that dtype; `where` of two numbers uses the default."""
    chosen = condition.to(dtype)
    return chosen * first + (1.0 - chosen) * second


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, kl_type: KLType) -> Tensor:
    """Per-token KL estimator (Schulman's k1, k2, k3, and |k1|), (B, T). k3 is clamped like verl's low_var_kl."""
    difference = log_probs - ref_log_probs
    if kl_type == "k1":
        return difference
    if kl_type == "abs":
        return difference.abs()
    if kl_type == "k2":
        return 0.5 * difference.square()
    exponent = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (exponent.exp() - exponent - 1.0).clamp(-K3_LIMIT, K3_LIMIT)


def outside_band(entropy: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """True unless strictly inside the band; True on its bounds."""
    return ~((lower < entropy) & (entropy < upper))


def band_penalty(entropy: Tensor, lower: Tensor, upper: Tensor, penalty: Penalty, alpha: Scalar) -> Tensor:
    """P of each token or segment; 0 for "none" and for "gate", which has no P."""
    if penalty in ("none", "gate"):
        return torch.zeros_like(entropy)
    if penalty == "indicator":
        return alpha * outside_band(entropy, lower, upper).to(entropy.dtype)
    below, above = torch.relu(lower - entropy), torch.relu(entropy - upper)
    if penalty == "hinge":
        return alpha * (below + above)
    return alpha * (below.square() + above.square())


def epo_loss(logits: Tensor, inputs: LossInputs) -> EPOOutput:
    """The whole loss. logits: (B, T, V); differentiable any number of times, with the memory cost of eager PyTorch."""
    log_probs, entropy = masked_log_probs_and_entropy(logits, inputs)
    return loss_of_statistics(log_probs, entropy, inputs)


def loss_of_statistics(log_probs: Tensor, entropy: Tensor, inputs: LossInputs) -> EPOOutput:
    """The loss from log-prob and entropy, (B, T) and 0 where the mask is 0; differentiable with respect to both.

    A caller that computes the two statistics itself gets a = ∂loss/∂log_prob and b = ∂loss/∂H by autograd over (B, T)
    tensors only.
    """
    mask = inputs.mask
    losses = token_losses(log_probs, entropy, inputs)
    weights, lengths = loss_weights(inputs, log_probs.dtype)
    loss = (weights * _at(mask, losses.total)).sum()

    sums = row_sums(log_probs.detach(), entropy.detach(), weights, losses, inputs)
    sums["sequences"] = (lengths > 0).sum(dtype=torch.float64)
    sums["recomputed_tokens"] = torch.zeros_like(sums["tokens"])
    metrics = LossMetrics(torch.stack([sums[name] for name in METRIC_NAMES]))
    return EPOOutput(loss, metrics, log_probs.detach().reshape(inputs.shape), entropy.detach().reshape(inputs.shape))


def row_sums(
    log_probs: Tensor, entropy: Tensor, weights: Tensor, losses: TokenLosses, inputs: LossInputs
) -> dict[str, Tensor]:
    """The sums over counted tokens behind the metrics, 0-d float64; log_probs and entropy are detached."""
    mask = inputs.mask
    invalid = mask & (losses.band.invalid | ~valid_tokens(inputs))
    logged = {
        "tokens": mask,
        "loss": weights * losses.total,
        "pg_loss": weights * losses.pg,
        "penalty": weights * losses.band.penalty,
        "kl_loss": weights * losses.kl,
        "entropy_sum": entropy,
        "log_prob_sum": log_probs,
        "ratio_sum": losses.policy.ratio,
        "ppo_kl_sum": -losses.policy.log_ratio,
        "clipped_tokens": losses.policy.clipped,
        "dual_clipped_tokens": losses.policy.dual_clipped,
        "below_band_tokens": losses.band.below,
        "above_band_tokens": losses.band.above,
        "nonfinite_tokens": ~(torch.isfinite(losses.total) & torch.isfinite(entropy)) & ~invalid,
        "invalid_tokens": invalid,
    }
    return {name: _at(mask, values.detach()).sum(dtype=torch.float64) for name, values in logged.items()}


def loss_of_given_statistics(log_probs: Tensor, entropy: Tensor, inputs: LossInputs) -> EPOOutput:
    """`loss_of_statistics` for statistics given by the caller, which are not read where the mask is 0."""
    log_probs = _nan_at(inputs.mask & ~valid_tokens(inputs), log_probs)
    return loss_of_statistics(_at(inputs.mask, log_probs), _at(inputs.mask, entropy), inputs)


class TokenLosses(NamedTuple):
    """ℓ of each token and its terms, all (B, T); unspecified where the mask is 0."""

    total: Tensor
    pg: Tensor  # including its importance weight
    kl: Tensor  # before its coefficient, detached
    policy: PolicyLoss
    band: Band


def token_losses(log_probs: Tensor, entropy: Tensor, inputs: LossInputs) -> TokenLosses:
    """ℓ = is_weight pg - λ (gate H - β k P) + kl_coeff KL of each token, before its weight."""
    mask, coefficients, cfg = inputs.mask, inputs.coefficients, inputs.cfg
    policy = policy_loss(policy_inputs(log_probs, inputs), cfg)
    pg = policy.pg
    watched = _source(coefficients.entropy, _source(coefficients.penalty, entropy))
    band = band_of_tokens(watched, inputs)
    total = pg
    if _may_be_on(coefficients.entropy):
        bonus = band.gate * entropy
        if _may_be_on(coefficients.penalty):
            bonus = bonus - _term(coefficients.penalty, band.penalty)
        total = total - _term(coefficients.entropy, bonus)
    kl = torch.zeros_like(pg)
    if inputs.ref_log_probs is not None:
        ref = _at(mask, inputs.ref_log_probs)
        kl = kl_penalty(log_probs.detach(), ref, cfg.kl_type)
        if cfg.kl_bias_correction:
            kl = policy.ratio.detach() * kl
        if _may_be_on(coefficients.kl):
            term = kl_penalty(_source(coefficients.kl, log_probs), ref, cfg.kl_type)
            if cfg.kl_bias_correction:
                term = _source(coefficients.kl, policy.ratio) * term
            total = total + _term(coefficients.kl, term)
    # Clamps and comparisons block the gradient of NaN too; here it must reach the row.
    lost = mask & (total.isnan() | band.invalid)
    total = torch.where(lost, _nan_at(lost, log_probs), total)
    return TokenLosses(total, pg, kl, policy, band)


def policy_inputs(log_probs: Tensor, inputs: LossInputs) -> PolicyInputs:
    """The inputs of the policy loss from checked arguments; masked tokens are 0."""
    mask, groups = inputs.mask, None
    if inputs.cfg.ratio_unit == "sequence":
        groups = Groups(mask, inputs.aggregation.sequence_ids, inputs.aggregation.num_sequences)
    elif inputs.cfg.ratio_unit == "segment":
        groups = Groups(mask, inputs.segment_ids, inputs.num_segments)
    return PolicyInputs(
        log_probs,
        log_probs.detach() if inputs.old_log_probs is None else _at(mask, inputs.old_log_probs),
        _at(mask, inputs.advantages),
        None if inputs.is_weights is None else _at(mask, inputs.is_weights),
        groups,
    )


def loss_weights(inputs: LossInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(token weights (B, T), counted tokens per sequence (num_sequences,))."""
    aggregation = inputs.aggregation
    lengths = sequence_lengths(inputs.mask, aggregation.sequence_ids, aggregation.num_sequences)
    return token_weights(inputs.mask, aggregation, lengths, dtype), lengths


def transform_at_mask(inputs: TokenInputs) -> LogitTransform:
    """The transform, with a temperature of 1 where the mask is 0."""
    transform = inputs.transform
    if not isinstance(transform.temperature, Tensor) or transform.temperature.dim() == 0:
        return transform
    return replace(transform, temperature=torch.where(inputs.mask, transform.temperature, 1.0))


def masked_log_probs_and_entropy(logits: Tensor, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """`log_probs_and_entropy` of raw logits (B, T, V): 0 where the mask is 0, NaN log-prob for an invalid token."""
    mask = inputs.mask
    z = transform_logits(torch.where(mask[..., None], logits, 0.0), transform_at_mask(inputs))
    valid = mask & valid_tokens(inputs)
    log_probs, entropy = log_probs_and_entropy(z, torch.where(valid, inputs.tokens, 0))
    return _at(mask, _nan_at(mask & ~valid, log_probs)), _at(mask, entropy)


class DistributionStatistics(NamedTuple):
    """What a token's distribution looks like, each value float32 (float64 for float64 logits), 0 where the mask is 0.

    Attributes:
        entropy: H = -Σ p log p, in nats.
        varentropy: Σ p (log p + H)², the variance of -log p, in nats². 0 if all possible tokens are equally probable.
        max_prob: the probability of the most probable token.
        collision_prob: Σ p², the probability that two samples agree; its inverse is an effective number of tokens.
    """

    entropy: Tensor
    varentropy: Tensor
    max_prob: Tensor
    collision_prob: Tensor


def distribution_statistics(logits: Tensor, inputs: TokenInputs) -> DistributionStatistics:
    """The statistics of raw logits (B, T, V), each (B, T)."""
    mask = inputs.mask
    z = transform_logits(torch.where(mask[..., None], logits, 0.0), transform_at_mask(inputs))
    log_probs = z - z.amax(dim=-1, keepdim=True)
    log_probs = log_probs - log_probs.exp().sum(dim=-1, keepdim=True).log()
    probs = log_probs.exp()
    finite = log_probs.masked_fill(log_probs == float("-inf"), 0.0)
    entropy = -(probs * finite).sum(dim=-1)
    variance = (probs * (finite + entropy[..., None]).square()).sum(dim=-1)
    values = entropy, variance, probs.amax(dim=-1), probs.square().sum(dim=-1)
    return DistributionStatistics(*(_at(mask, value) for value in values))


class Band(NamedTuple):
    """The effect of the band on each token, all (B, T)."""

    penalty: Tensor
    gate: Tensor  # multiplies the bonus, detached
    below: Tensor
    above: Tensor
    invalid: Tensor  # the token's bounds are crossed or NaN


def band_of_tokens(entropy: Tensor, inputs: LossInputs) -> Band:
    """Compare each token's entropy, or its segment's mean, with the band."""
    cfg = inputs.cfg
    if inputs.lower is None or inputs.upper is None:
        nowhere = torch.zeros_like(inputs.mask)
        return Band(torch.zeros_like(entropy), torch.ones_like(entropy), nowhere, nowhere, nowhere)
    if cfg.band_scope == "token":
        held = entropy
        lower = torch.where(inputs.mask, inputs.lower, float("-inf"))
        upper = torch.where(inputs.mask, inputs.upper, float("inf"))
        invalid = ~(lower <= upper)
    else:
        groups = Groups(inputs.mask, inputs.segment_ids, inputs.num_segments)
        (held,) = groups.means(entropy)
        lower, upper = inputs.lower, inputs.upper
        invalid = lower.isnan() | upper.isnan()
    gate = torch.ones_like(held)
    if cfg.penalty == "gate":
        gate = torch.where(outside_band(held.detach(), lower, upper), cfg.penalty_alpha, gate)
    penalty = band_penalty(held, lower, upper, cfg.penalty, cfg.penalty_alpha)
    band = Band(penalty, gate, held < lower, held > upper, invalid)
    if cfg.band_scope == "token":
        return band
    return Band(*(groups.spread(part) for part in band))


def _at(mask: Tensor, values: Tensor) -> Tensor:
    """values where the mask is 1 and 0 elsewhere, for both value and gradient."""
    return torch.where(mask, values, 0)


def _nan_at(bad: Tensor, values: Tensor) -> Tensor:
    """values, and NaN where bad, for both value and gradient.

    Multiplied rather than added: the clamp of a NaN ratio has gradient 0, and only 0 * NaN reaches the row.
    """
    return values * torch.ones_like(values).masked_fill(bad, float("nan"))


def valid_tokens(inputs: TokenInputs) -> Tensor:
    """(B, T) bool: the token is in the vocabulary and its other arguments are consistent; unspecified where masked."""
    in_vocabulary = (inputs.tokens >= 0) & (inputs.tokens < inputs.transform.vocab_size)
    return in_vocabulary if inputs.invalid is None else in_vocabulary & ~inputs.invalid


def _may_be_on(coefficient: Scalar) -> bool:
    """Whether a term must be computed: a nonzero number, or a tensor whose value is not known here."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def _term(coefficient: Scalar, values: Tensor) -> Tensor:
    """coefficient * values, and 0 if the coefficient is a tensor of 0, because values may be infinite."""
    product = coefficient * values
    return torch.where(coefficient != 0, product, 0) if isinstance(coefficient, Tensor) else product


def _source(coefficient: Scalar, values: Tensor) -> Tensor:
    """The input of a term: values, detached from the graph if the coefficient is a tensor of 0.

    `_term` alone has gradient 0, which an infinite derivative upstream would turn into NaN.
    """
    return torch.where(coefficient != 0, values, values.detach()) if isinstance(coefficient, Tensor) else values
