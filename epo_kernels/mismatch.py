"""Importance weights that correct the mismatch between the sampling engine and the learner.

An inference engine (other kernels, another precision, older weights) samples from a policy q that differs slightly from
the learner's policy p. The policy loss is weighted by p/q, bounded to limit the variance.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from epo_kernels.inputs import TokenBatch, as_scalar, as_token_batch

RolloutMode = Literal["truncate", "mask"]
RolloutLevel = Literal["token", "sequence", "geometric"]


@torch.no_grad()
def rollout_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    *,
    mode: RolloutMode = "truncate",
    level: RolloutLevel = "token",
    low: float | None = None,
    high: float | None = 2.0,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance weights for `epo_loss(..., is_weights=)`, and metrics of the mismatch.

    ρ is the ratio of a token, by `level`::

        token       p/q of the token
        sequence    product of p/q over its sequence (or segment)
        geometric   exp(mean of log p/q) over its sequence (or segment)

    and by `mode`::

        truncate    clip(ρ, low, high)
        mask        ρ where low <= ρ <= high, else 0

    Sources: "truncate" is truncated importance sampling (Ionides 2008; for this mismatch Yao et al. 2025,
    fengyao.notion.site/off-policy-rl), TRL's `token_truncate` and `sequence_truncate`, verl's `rollout_is`. "mask" with
    level "token", low 0.5 and high 5 is IcePop ("Small Leak Can Sink a Great Ship", 2025); with level "sequence" it is
    masked importance sampling, TRL's `token_mask` and `sequence_mask`. "geometric" is GSPO's length-normalised ratio
    (arXiv 2507.18071).

    Args:
        old_log_probs: log p of the sampled tokens under the learner before its update, (B, T) or packed (N,), float32
            or float64.
        rollout_log_probs: log q as reported by the engine; like old_log_probs.
        mask: like old_log_probs, bool or 0/1: 1 at tokens that the policy generated. No other argument is read where
            it is 0.
        mode: what to do with ratios outside the bounds.
        level: the tokens that share a ratio.
        low: lower bound, >= 0; None for no bound.
        high: upper bound, > 0 and at least low; None for no bound.
        cu_seqlens: int, (num_sequences + 1,), boundaries of packed sequences. Required for packed tokens with level
            "sequence" or "geometric", unless segment_ids are given.
        segment_ids: int, like old_log_probs: the segment (a turn) of each token, unique in the batch. With level
            "sequence" or "geometric" the ratio is then computed per segment.
        num_segments: exclusive upper limit of segment_ids; None: the number of tokens.

    Returns:
        The weights, float32 like old_log_probs, detached, 0 where the mask is 0 or the ratio is rejected; and metrics
        over the counted tokens, each a detached 0-d float64 tensor (NaN if no token counts):

        - `rollout_is_mean`, `rollout_is_min`, `rollout_is_max`: of the weights.
        - `rollout_is_ratio_mean`: mean ρ, before the bounds.
        - `rollout_is_ratio_fraction_high`, `rollout_is_ratio_fraction_low`: share of tokens whose ρ is above `high`
            or below `low`, and is therefore truncated or rejected, depending on `mode`.
        - `rollout_is_eff_sample_size`: effective sample size as a share of the tokens, (mean w)² / mean w²; 0
            if all are rejected.
        - `rollout_kl_k1`, `rollout_kl_k3`: estimates of KL(q || p) per token: means of log q/p and of
            p/q - 1 - log p/q (never negative).
        - `rollout_probs_diff_mean`, `rollout_probs_diff_max`, `rollout_probs_diff_std`: of |p - q|.

        A NaN ratio stays NaN, so that it shows in the loss.

    Raises:
        ValueError: shapes differ, mode or level is unknown, bounds are out of order, or sequences are unknown; on the
            CPU also if values are out of range. On other devices the weights of such tokens are NaN.
        TypeError: an argument has the wrong type, or log-probs are 16-bit.
    """
    _check_choice("mode", mode, get_args(RolloutMode))
    _check_choice("level", level, get_args(RolloutLevel))
    lower, upper = _check_bounds(low, high)
    batch = as_token_batch(
        "old_log_probs",
        old_log_probs,
        mask,
        cu_seqlens=cu_seqlens,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    if level != "token" and batch.segment_ids is None:
        raise ValueError(f"cu_seqlens or segment_ids must be given for packed tokens with level={level!r}")
    old = torch.where(batch.mask, batch.layout.log_probs("old_log_probs", old_log_probs), 0.0)
    engine = torch.where(batch.mask, batch.layout.log_probs("rollout_log_probs", rollout_log_probs), 0.0)
    ratio = _shared(old - engine, batch, level).exp()
    weights = ratio.clamp(lower, upper)
    if mode == "mask":
        weights = torch.where((ratio < lower) | (ratio > upper), 0.0, ratio)
    weights = torch.where(batch.mask, weights, 0.0)
    metrics = _weight_metrics(ratio, weights, batch.mask, lower, upper) | _gap_metrics(old, engine, batch.mask)
    return batch.result(weights), metrics


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """The bounds as numbers: 0 and infinity if not given."""
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number or None, got a tensor")
        if value is not None:
            as_scalar(name, value, low=0.0)
    lower, upper = 0.0 if low is None else float(low), math.inf if high is None else float(high)
    if not lower <= upper or upper == 0:
        raise ValueError(f"low and high must satisfy 0 <= low <= high and high > 0, got {low} and {high}")
    return lower, upper


def _shared(log_ratio: Tensor, batch: TokenBatch, level: RolloutLevel) -> Tensor:
    """log ρ of each token, (B, T) float64."""
    if level == "token":
        return log_ratio
    assert batch.segment_ids is not None
    ids = batch.segment_ids.reshape(-1)
    sums = log_ratio.new_zeros(batch.num_segments).index_add_(0, ids, log_ratio.reshape(-1))
    if level == "geometric":
        counts = torch.zeros_like(sums).index_add_(0, ids, batch.mask.reshape(-1).to(sums.dtype))
        sums = sums / counts.clamp(min=1)
    return sums[batch.segment_ids]


def _weight_metrics(ratio: Tensor, weights: Tensor, mask: Tensor, lower: float, upper: float) -> dict[str, Tensor]:
    mean, square = _mean(weights, mask), _mean(weights.square(), mask)
    return {
        "rollout_is_mean": mean,
        "rollout_is_min": _extreme(weights, mask, math.inf),
        "rollout_is_max": _extreme(weights, mask, -math.inf),
        "rollout_is_ratio_mean": _mean(ratio, mask),
        "rollout_is_ratio_fraction_high": _mean((ratio > upper).double(), mask),
        "rollout_is_ratio_fraction_low": _mean((ratio < lower).double(), mask),
        "rollout_is_eff_sample_size": torch.where(square == 0, square, mean.square() / square),
    }


def _gap_metrics(old: Tensor, engine: Tensor, mask: Tensor) -> dict[str, Tensor]:
    log_ratio = old - engine
    gap = (old.exp() - engine.exp()).abs()
    mean = _mean(gap, mask)
    return {
        "rollout_kl_k1": -_mean(log_ratio, mask),
        "rollout_kl_k3": _mean(log_ratio.expm1() - log_ratio, mask),
        "rollout_probs_diff_mean": mean,
        "rollout_probs_diff_max": _extreme(gap, mask, -math.inf),
        "rollout_probs_diff_std": _mean((gap - mean).square(), mask).sqrt(),
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def _extreme(values: Tensor, mask: Tensor, otherwise: float) -> Tensor:
    """The largest counted value if `otherwise` is -inf, the smallest if it is inf; NaN if no token counts."""
    if values.numel() == 0:
        return values.new_full((), math.nan)
    values = torch.where(mask, values, otherwise)
    extreme = values.amax() if otherwise < 0 else values.amin()
    return torch.where(mask.any(), extreme, math.nan)
