"""The mismatch between the engine that sampled and the learner that updates: measured, and corrected if asked.

Another engine (other kernels, another precision) samples from a policy q that isn't quite the learner's p, so that
what looks on-policy is not. Truncated importance weights min(p/q, cap) on the policy loss make up for it: Ionides 2008
(Truncated Importance Sampling), for this mismatch Yao et al. 2025 (Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training, fengyao.notion.site/off-policy-rl), cap 2 as in verl's rollout correction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epo_kernels.train.config import TrainConfig
from epo_kernels.train.data import Sample


def rollout_is_level(config: TrainConfig) -> str:
    """none | token | turn: loss.rollout_is, with auto resolved by the engine."""
    if config.loss.rollout_is != "auto":
        return config.loss.rollout_is
    return "none" if config.rollout.engine == "transformers" else "token"


def set_rollout_weights(samples: Sequence[Sample], level: str, cap: float) -> None:
    """Set each sample's `is_weights`, min(p/q, `cap`) where the policy wrote and 0 elsewhere.

    Args:
        samples: scored (old_log_probs), with the engine's rollout_log_probs.
        level: "none": no weights. "token": each token's own ratio, which leaves out that earlier tokens of the turn
            were sampled from q too: a small bias for a small variance. "turn": the product over the turn's tokens, for
            each of them; untruncated, the expected gradient is the on-policy one given what the turn saw, with a
            variance that grows with the turn's length.
        cap: larger ratios count as this.
    """
    if level == "none":
        return
    for sample in samples:
        weights = _log_ratios(sample, level).exp().clamp(max=cap).float()
        sample.is_weights = torch.zeros(len(sample.turns)).masked_scatter(sample.mask, weights)


def mismatch_metrics(samples: Sequence[Sample], level: str, cap: float) -> dict[str, float]:
    """How far the engine's probabilities q of the tokens it sampled are from the learner's p, corrected or not.

    `training/rollout_kl_*` estimate KL(q || p) a token: k1 is the mean of log q/p, k3 that of p/q - 1 - log p/q, which
    is never negative. `training/rollout_is_*` are of the weights; where there are none, of those by token.
    """
    q = torch.cat([_of(sample.rollout_log_probs)[sample.mask] for sample in samples]).double().exp()
    log_ratio = torch.cat([_log_ratios(sample, "token") for sample in samples])
    gap = (q - q * log_ratio.exp()).abs()
    ratio = torch.cat([_log_ratios(sample, level) for sample in samples]).exp()
    weights = ratio.clamp(max=cap)
    return {
        "training/rollout_probs_diff_mean": float(gap.mean()),
        "training/rollout_probs_diff_max": float(gap.max()),
        "training/rollout_probs_diff_std": float(gap.std(unbiased=False)),
        "training/rollout_kl_k1": float(-log_ratio.mean()),
        "training/rollout_kl_k3": float((log_ratio.expm1() - log_ratio).mean()),
        "training/rollout_is_mean": float(weights.mean()),
        "training/rollout_is_min": float(weights.min()),
        "training/rollout_is_truncated_share": float((ratio > cap).double().mean()),
    }


def _log_ratios(sample: Sample, level: str) -> Tensor:
    """log p/q of each token that the policy wrote, (N,) float64; "turn": of its whole turn."""
    learner, engine = sample.old_log_probs, sample.rollout_log_probs
    own = (_of(learner).double() - _of(engine).double())[sample.mask]
    if level != "turn":
        return own
    turns = torch.tensor(sample.turns)[sample.mask]
    return torch.zeros(int(turns.max()) + 1, dtype=own.dtype).index_add_(0, turns, own)[turns]


def _of(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("samples must have the engine's log-probs and be scored before the two are compared")
    return values
