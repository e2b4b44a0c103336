"""The mismatch between sampling engine and learner, corrected as configured.

Computes the weights and metrics of `ek.rollout_weights` over the samples of a training step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.train.config import TrainConfig
from epo_kernels.train.data import Sample
from epo_kernels.train.rl.packed import PackedSamples

# Logged as training/NAME, together with rollout_is_truncated_share.
_LOGGED = (
    "rollout_probs_diff_mean",
    "rollout_probs_diff_max",
    "rollout_probs_diff_std",
    "rollout_kl_k1",
    "rollout_kl_k3",
    "rollout_is_mean",
    "rollout_is_min",
)


def rollout_is_level(config: TrainConfig) -> str:
    """none | token | turn: loss.rollout_is, with auto resolved by the engine."""
    if config.loss.rollout_is != "auto":
        return config.loss.rollout_is
    return "none" if config.rollout.engine == "transformers" else "token"


def set_rollout_weights(samples: Sequence[Sample], level: str, cap: float) -> None:
    """Set each sample's `is_weights`: min(p/q, `cap`) for generated tokens, 0 elsewhere.

    Args:
        samples: scored (old_log_probs), with the engine's rollout_log_probs.
        level: "none": no weights. "token": each token's own ratio, which ignores that earlier tokens of the turn were
            also sampled from q: a small bias for low variance. "turn": the product over the turn's tokens, used for all
            of them; untruncated, the expected gradient is the on-policy one given the turn's prompt, with a variance
            that grows with the turn's length.
        cap: larger ratios are truncated to this.
    """
    if level == "none":
        return
    packed = PackedSamples.of(samples)
    weights, _ = _weights(samples, packed, level, cap)
    for sample, own in zip(samples, packed.split(weights), strict=True):
        sample.is_weights = own


def mismatch_metrics(samples: Sequence[Sample], level: str, cap: float) -> dict[str, float]:
    """Differences between the engine's and the learner's probabilities of the sampled tokens, corrected or not.

    Metric names are those of `ek.rollout_weights` after `training/`; `training/rollout_is_truncated_share` is the share
    of tokens whose ratio exceeds the cap. Without weights, `training/rollout_is_*` describe token-level weights.
    """
    _, metrics = _weights(samples, PackedSamples.of(samples), level, cap)
    named = {f"training/{name}": float(metrics[name]) for name in _LOGGED}
    return named | {"training/rollout_is_truncated_share": float(metrics["rollout_is_ratio_fraction_high"])}


def _weights(
    samples: Sequence[Sample], packed: PackedSamples, level: str, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    return ek.rollout_weights(
        torch.cat([_of(sample.old_log_probs) for sample in samples]),
        torch.cat([_of(sample.rollout_log_probs) for sample in samples]),
        packed.mask,
        level="sequence" if level == "turn" else "token",
        high=None if math.isinf(cap) else cap,
        segment_ids=packed.segment_ids,
    )


def _of(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("samples must have rollout_log_probs and be scored before they are compared")
    return values
