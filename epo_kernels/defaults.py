"""The defaults of the entropy band, shared by the driver, TRL and verl."""

from __future__ import annotations

from dataclasses import dataclass

from epo_kernels.config import BandScope, EPOConfig, Penalty
from epo_kernels.history import HistoryScope, HistoryWeighting


@dataclass(frozen=True)
class BandDefaults:
    """The default band when a trainer enables EPO without further settings: the paper's second version.

    arXiv 2509.22576v2: a hinge around the mean entropy of earlier steps, with the phase schedule. `penalty="none"`
    leaves the plain entropy bonus. `EPOConfig` itself defaults to no penalty, because the band also needs a history.

    Attributes:
        entropy_coeff: λ, the weight of entropy bonus and penalty.
        penalty: see `EPOConfig`, also for the next three.
        penalty_alpha: α; the paper uses 0.1 on ALFWorld and 0.05 on ScienceWorld.
        smooth_coeff: k.
        band_scope: "token" or "segment".
        band_low: κ_l, the lower bound as a multiple of the historical mean entropy.
        band_high: κ_r, the upper bound.
        history_scope: see `EntropyHistory`, also for the next two.
        history_weighting: "step": the paper's mean over steps.
        history_window: number of steps; None for all.
        history_includes_current: False: a step's band uses earlier steps only.
        phase_schedule: see `phase_weight`.
        phase_horizon: number of steps the schedule spans; None for the whole training run.
    """

    entropy_coeff: float = EPOConfig.entropy_coeff
    penalty: Penalty = "hinge"
    penalty_alpha: float = EPOConfig.penalty_alpha
    smooth_coeff: float = EPOConfig.smooth_coeff
    band_scope: BandScope = EPOConfig.band_scope
    band_low: float = 0.0
    band_high: float = 2.0
    history_scope: HistoryScope = "turn"
    history_weighting: HistoryWeighting = "step"
    history_window: int | None = None
    history_includes_current: bool = False
    phase_schedule: str = "paper"
    phase_horizon: int | None = None


BAND = BandDefaults()
