"""Metrics of a loss: one small vector on the device, with named sums and counts that can be added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epo_kernels.declaration import METRIC_NAMES

_INDEX = {name: i for i, name in enumerate(METRIC_NAMES)}

# Means over counted tokens: the usual metric name, and the sum it is computed from.
_TOKEN_MEANS = {
    "entropy": "entropy_sum",
    "log_prob": "log_prob_sum",
    "ratio": "ratio_sum",
    "ppo_kl": "ppo_kl_sum",
    "pg_clipfrac": "clipped_tokens",
    "pg_clipfrac_lower": "dual_clipped_tokens",
    "below_band_fraction": "below_band_tokens",
    "above_band_fraction": "above_band_tokens",
}


@dataclass(eq=False)
class LossMetrics:
    """Sums and counts of one loss call; add them over micro-batches, `all_reduce` them over ranks.

    Each name in `METRIC_NAMES` is an attribute: a detached 0-d float64 tensor on the device (reading it as a number
    syncs). With a common `normalizer` the weighted sums (`loss`, `pg_loss`, `penalty`, `kl_loss`) of micro-batches add
    up to the sums of the whole batch.

    Attributes:
        values: (len(METRIC_NAMES),) float64, detached.
    """

    values: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name in _INDEX:
            return self.values[_INDEX[name]]
        raise AttributeError(f"LossMetrics has no {name!r}; it has {', '.join(METRIC_NAMES)}")

    def __add__(self, other: LossMetrics) -> LossMetrics:
        return LossMetrics(self.values + other.values)

    def __radd__(self, other: int) -> LossMetrics:
        """Supports `sum(metrics)`, which starts from 0."""
        return self if other == 0 else NotImplemented

    def replace(self, **values: Tensor) -> LossMetrics:
        """A copy with the named values replaced."""
        replaced = self.values.clone()
        for name, value in values.items():
            replaced[_INDEX[name]] = value
        return LossMetrics(replaced)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> LossMetrics:
        """The sum over the ranks of `group` (None: the default group).

        Counts are exact; float64 sums may differ from a single process by rounding (2^-53 of their terms).
        """
        values = self.values.clone()
        torch.distributed.all_reduce(values, group=group)
        return LossMetrics(values)

    def to_floats(self) -> dict[str, float]:
        """All sums and counts, and the usual token means (`entropy`, `ppo_kl`, `pg_clipfrac`, ...), as floats.

        Syncs the device once. Means are NaN if no token counts.
        """
        sums = dict(zip(METRIC_NAMES, self.values.tolist(), strict=True))
        tokens = sums["tokens"]
        means = {name: sums[total] / tokens if tokens else float("nan") for name, total in _TOKEN_MEANS.items()}
        return {**sums, **means}
