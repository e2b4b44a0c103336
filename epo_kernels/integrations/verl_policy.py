"""verl's registered policy losses, computed by the library: loss, gradient and metrics equal verl's own functions.

Where verl's function differs from the library's policy loss, this module adapts it: "sapo" and "geo_mean" ignore
loss_agg_mode, "geo_mean" and "clip_cov" change the rollout weights, and "kl_cov" adds a penalty to selected tokens.

The library clamps log-ratios at ±20 (per token, or a sequence's mean). verl clamps the mean of "gspo" at 10, and does
not clamp "geo_mean", "clip_cov" and "kl_cov"; beyond these bounds the results differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss

from epo_kernels.config import EPOConfig
from epo_kernels.functional import epo_loss_from_log_probs
from epo_kernels.integrations.verl_keys import clip_range
from epo_kernels.reference import EPOOutput


@dataclass(frozen=True)
class PolicyBatch:
    """The inputs of verl's policy losses for a micro-batch: (B, T) each, mask bool; without weights all count as 1."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    is_weights: Tensor | None

    def mean(self, values: Tensor) -> Tensor:
        """Mean over counted tokens, 0-d; 0 if there are none."""
        return torch.where(self.mask, values, 0).sum() / self.mask.sum().clamp(min=1)

    def log_ratio(self) -> Tensor:
        """log_prob - old_log_prob, and 0 where the mask is 0."""
        return torch.where(self.mask, self.log_probs - self.old_log_probs, 0)


class VerlLoss(NamedTuple):
    """The total loss of a micro-batch.

    Attributes:
        loss: 0-d, differentiable.
        sums: the library's metrics, see `LossMetrics.to_floats`.
        policy_metrics: the metrics of verl's policy loss, under verl's names.
    """

    loss: Tensor
    sums: dict[str, float]
    policy_metrics: dict[str, float]


def verl_loss(
    name: str,
    batch: PolicyBatch,
    entropy: Tensor,
    actor: Any,
    cfg: EPOConfig,
    loss_agg_mode: str,
    batch_info: Mapping[str, Any],
    **terms: Any,
) -> VerlLoss:
    """The loss of a micro-batch with the named policy loss of verl.

    Args:
        name: one of `verl_keys.POLICY_LOSSES`.
        entropy: (B, T).
        actor: verl's ActorConfig.
        cfg: `EPOSettings.loss_config` of the same actor.
        loss_agg_mode, batch_info: as in verl's `agg_loss`.
        terms: keyword arguments of `epo_loss_from_log_probs` for entropy, KL and band.

    Raises:
        ValueError: several data-parallel ranks without the size of the global batch.
    """
    batch, penalty, metrics = _prepare(name, batch, actor)
    scale = normalization(loss_agg_mode, **batch_info)
    if name in ("sapo", "geo_mean"):
        policy, rest = _policy_apart(name, batch, entropy, cfg, batch_info, scale, terms)
        loss = policy.loss + rest.loss
        ours = policy.metrics.to_floats()
        of_policy = ("pg_loss", "ppo_kl_sum", "clipped_tokens", "dual_clipped_tokens")
        sums = rest.metrics.to_floats() | {key: ours[key] for key in of_policy}
    else:
        out = _library_loss(batch, entropy, cfg, **terms, **scale)
        loss, sums = out.loss, out.metrics.to_floats()
    if penalty is not None:
        term = agg_loss(penalty, batch.mask, loss_agg_mode, **batch_info)
        loss = loss + term
        sums["pg_loss"] += term.item()
    return VerlLoss(loss, sums, policy_metrics(sums) if metrics is None else metrics)


def normalization(
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> dict[str, Any]:
    """The denominator of verl's `agg_loss`, as library arguments. Gradients are averaged over ranks later."""
    normalizer = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if loss_agg_mode == "token-sum":
        normalizer = 1
    if normalizer is None and dp_size > 1:
        raise ValueError(f"verl gave no size of the global batch, with {dp_size} data-parallel ranks")
    return {"normalizer": normalizer, "loss_scale": float(dp_size), "max_length": loss_scale_factor}


def policy_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics common to most of verl's policy losses: means over a micro-batch's tokens, 0 if it has none."""
    tokens = max(sums["tokens"], 1.0)
    return {
        "actor/pg_clipfrac": sums["clipped_tokens"] / tokens,
        "actor/ppo_kl": sums["ppo_kl_sum"] / tokens,
        "actor/pg_clipfrac_lower": sums["dual_clipped_tokens"] / tokens,
    }


def _library_loss(batch: PolicyBatch, entropy: Tensor, cfg: EPOConfig, **keywords: Any) -> EPOOutput:
    return epo_loss_from_log_probs(
        batch.log_probs,
        entropy,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        cfg,
        is_weights=batch.is_weights,
        **keywords,
    )


def _policy_apart(
    name: str,
    batch: PolicyBatch,
    entropy: Tensor,
    cfg: EPOConfig,
    batch_info: Mapping[str, Any],
    scale: Mapping[str, Any],
    terms: Mapping[str, Any],
) -> tuple[EPOOutput, EPOOutput]:
    """The policy loss in the aggregation fixed by verl, and the other terms in that of the config."""
    own = replace(cfg, loss_agg_mode="seq-mean-token-mean", penalty="none")
    if name == "geo_mean":  # verl takes the plain mean over a micro-batch's rows, on every rank
        own_scale: dict[str, Any] = {"normalizer": batch.mask.shape[0]}
    else:
        own_scale = normalization("seq-mean-token-mean", **batch_info)
    policy = _library_loss(batch, torch.zeros_like(entropy), own, entropy_coeff=0.0, kl_coeff=0.0, **own_scale)
    without = replace(batch, advantages=torch.zeros_like(batch.advantages), is_weights=None)
    return policy, _library_loss(without, entropy, cfg, **terms, **scale)


def _prepare(name: str, batch: PolicyBatch, actor: Any) -> tuple[PolicyBatch, Tensor | None, dict[str, float] | None]:
    """The batch with the loss's own weights, a penalty per token (B, T), and metrics that replace `policy_metrics`."""
    log_ratio = batch.log_ratio().detach()
    if name == "gpg":
        return batch, None, {}
    if name == "geo_mean":
        return replace(batch, is_weights=_sequence_weights(batch)), None, _geo_mean_metrics(batch, log_ratio, actor)
    if name == "clip_cov":
        dropped = _clip_cov_tokens(batch, log_ratio, actor)
        kept = (~dropped).to(batch.log_probs.dtype)
        weights = kept if batch.is_weights is None else kept * batch.is_weights
        return replace(batch, is_weights=weights), None, _means(batch, pg_clipfrac=dropped, ppo_kl=-log_ratio)
    if name == "kl_cov":
        coefficient = actor.policy_loss.ppo_kl_coef
        penalty = (1.0 if coefficient is None else coefficient) * batch.log_ratio().abs()
        if batch.is_weights is not None:
            penalty = batch.is_weights * penalty
        penalty = torch.where(_kl_cov_tokens(batch, actor), penalty, 0)
        return batch, penalty, _means(batch, ppo_kl=log_ratio.abs())
    return batch, None, None


def _sequence_weights(batch: PolicyBatch) -> Tensor | None:
    """The geometric mean of each row's weights, repeated for its tokens, (B, T)."""
    if batch.is_weights is None:
        return None
    logs = torch.where(batch.mask, (batch.is_weights + 1e-10).log(), 0)
    means = logs.sum(dim=1, keepdim=True) / batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
    return means.exp().expand(batch.mask.shape)


def _geo_mean_metrics(batch: PolicyBatch, log_ratio: Tensor, actor: Any) -> dict[str, float]:
    """verl counts log-ratios beyond either bound by the sign of the advantage."""
    low, high = clip_range(actor)
    outside = (log_ratio < -low) | (log_ratio > high)
    return _means(
        batch,
        pg_clipfrac=outside & (batch.advantages > 0),
        ppo_kl=-log_ratio,
        pg_clipfrac_lower=outside & (batch.advantages < 0),
    )


def _clip_cov_tokens(batch: PolicyBatch, log_ratio: Tensor, actor: Any) -> Tensor:
    """(B, T) bool: tokens without a gradient, sampled from those whose covariance is between verl's two bounds."""
    keys, (low, high) = actor.policy_loss, clip_range(actor)
    ratio = log_ratio.exp()
    clipped = -batch.advantages * ratio.clamp(1 - low, 1 + high) > -batch.advantages * ratio
    log_probs = batch.log_probs.detach()
    covariance = (batch.advantages - batch.mean(batch.advantages)) * (log_probs - batch.mean(log_probs))
    lowest = 1.0 if keys.clip_cov_lb is None else keys.clip_cov_lb
    highest = 5.0 if keys.clip_cov_ub is None else keys.clip_cov_ub
    places = (batch.mask & ~clipped & (covariance > lowest) & (covariance < highest)).nonzero()
    count = _share(keys.clip_cov_ratio, batch.mask)
    # Samples like verl, from the CPU generator: with the same seed both drop the same tokens.
    rows, columns = places[torch.randperm(len(places))[:count]].unbind(dim=1)
    dropped = torch.zeros_like(batch.mask)
    dropped[rows, columns] = True
    return dropped


def _kl_cov_tokens(batch: PolicyBatch, actor: Any) -> Tensor:
    """(B, T) bool: the tokens with the largest covariance of advantage and log-prob."""
    log_probs = batch.log_probs.detach()
    covariance = (batch.advantages - batch.mean(batch.advantages)) * (log_probs - batch.mean(log_probs))
    covariance = covariance.masked_fill(~batch.mask, float("-inf")).flatten()
    count = min(_share(actor.policy_loss.kl_cov_ratio, batch.mask), int(batch.mask.sum()))
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    chosen[covariance.topk(count).indices] = True
    return chosen.view(batch.mask.shape)


def _share(ratio: float | None, mask: Tensor) -> int:
    """That share of the counted tokens, at least one; None uses verl's default."""
    return max(int((0.0002 if ratio is None else ratio) * int(mask.sum())), 1)


def _means(batch: PolicyBatch, **values: Tensor) -> dict[str, float]:
    return {f"actor/{name}": batch.mean(value.to(torch.float32)).item() for name, value in values.items()}
