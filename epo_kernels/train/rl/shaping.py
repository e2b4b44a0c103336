"""Advantages shaped by entropy (algorithm.shape): `ek.shape_advantages` over the samples of a training step."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.shaping import ShapingRule
from epo_kernels.train.config import AlgorithmConfig
from epo_kernels.train.data import Episode, Sample
from epo_kernels.train.rl.packed import PackedSamples


def shape_samples(episodes: Sequence[Episode], samples: Sequence[Sample], config: AlgorithmConfig) -> None:
    """Shape each sample's `advantages` in place; a no-op with algorithm.shape=none.

    AEM normalises over the turns of a group of episodes, EMPG over all turns of the step, as published.

    Args:
        episodes: played; `Sample.episode` indexes them.
        samples: scored (old_log_probs, entropy), with advantages.
    """
    if config.shape == "none":
        return
    packed = PackedSamples.of(samples)
    groups = torch.tensor([episodes[sample.episode].group for sample in samples])
    shaped = ek.shape_advantages(
        torch.cat([_of(sample.advantages) for sample in samples]),
        torch.cat([_of(sample.entropy) for sample in samples]),
        packed.mask,
        rule=cast(ShapingRule, config.shape),
        coeff=1.0 if config.shape_coeff is None else config.shape_coeff,
        log_probs=torch.cat([_of(sample.old_log_probs) for sample in samples]),
        clarity_coeff=config.shape_clarity_coeff,
        clarity_weight=config.shape_clarity_weight,
        segment_ids=packed.segment_ids,
        cu_seqlens=packed.cu_seqlens,
        episode_ids=torch.tensor([sample.episode for sample in samples]),
        group_ids=groups if config.shape == "aem" else None,
    )
    for sample, own in zip(samples, packed.split(shaped), strict=True):
        sample.advantages = own


def _of(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("samples must be scored and have advantages before they are shaped")
    return values
