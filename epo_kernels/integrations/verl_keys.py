"""The keys that EPO adds to verl's config, and the library's config that follows from them and verl's own keys."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from epo_kernels.config import BandScope, EPOConfig, KLType, Penalty
from epo_kernels.defaults import BAND
from epo_kernels.history import EntropyHistory, HistoryScope, HistoryWeighting
from epo_kernels.schedule import phase_weight

LOSS_MODE = "epo"
KEYS = "actor_rollout_ref.actor.policy_loss.epo"
RESPONSE_MASK = "response_mask"

KL_TYPES: dict[str, KLType] = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


@dataclass(frozen=True)
class EPOSettings:
    """The keys under `actor_rollout_ref.actor.policy_loss.epo`; see `EPOConfig` and `EntropyHistory` for the maths.

    The defaults are `epo_kernels.defaults.BandDefaults`, the paper's hinge. A step's band only knows earlier steps.

    Attributes:
        penalty, penalty_alpha, smooth_coeff, band_scope: as in `EPOConfig`.
        band_low: κ_l: the band's lower bound as a share of the history's mean entropy.
        band_high: κ_r.
        num_turns: turns that the history tells apart; more of them in a batch is an error.
        turns: "response_mask" (the runs of 1s of a response are its turns), or the name of an integer field of the
            batch, one a sample (where each turn is a sample of its own) or one a response token.
        history_scope, history_weighting: scope and weighting of `EntropyHistory`.
        history_window: steps that count; None: all.
        phase_schedule: weight of the penalty over the steps, see `phase_weight`.
        phase_horizon: steps it spans; None: verl's total_training_steps.
    """

    penalty: Penalty = BAND.penalty
    penalty_alpha: float = BAND.penalty_alpha
    smooth_coeff: float = BAND.smooth_coeff
    band_scope: BandScope = BAND.band_scope
    band_low: float = BAND.band_low
    band_high: float = BAND.band_high
    num_turns: int = 64
    turns: str = RESPONSE_MASK
    history_scope: HistoryScope = BAND.history_scope
    history_weighting: HistoryWeighting = BAND.history_weighting
    history_window: int | None = BAND.history_window
    phase_schedule: str = BAND.phase_schedule
    phase_horizon: int | None = BAND.phase_horizon

    def __post_init__(self) -> None:
        EPOConfig(**self._loss_keys())
        self.make_history().bounds(torch.zeros(0, dtype=torch.int64), self.band_low, self.band_high)
        phase_weight(0, 1 if self.phase_horizon is None else self.phase_horizon, self.phase_schedule)

    @classmethod
    def of(cls, keys: Mapping[str, Any] | None) -> EPOSettings:
        """The settings of a config's keys.

        Raises:
            ValueError: an unknown key, with the one that is meant, or a value out of range.
            TypeError: a value of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in keys or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"{KEYS}.{key} is no key of EPO; {hint}")
        return cls(**(keys or {}))

    def make_history(self) -> EntropyHistory:
        return EntropyHistory(self.num_turns, self.history_window, self.history_scope, self.history_weighting)

    def loss_config(self, actor: Any, loss_agg_mode: str) -> EPOConfig:
        """The library's config: these keys, and verl's own of an ActorConfig.

        Raises:
            ValueError: a combination that can't be served; the message names verl's key.
        """
        if self.penalty != "none" and actor.entropy_coeff == 0:
            raise ValueError(
                f"{KEYS}.penalty={self.penalty} has no effect with actor_rollout_ref.actor.entropy_coeff=0: set "
                f"entropy_coeff (the paper's is {BAND.entropy_coeff:g}), or {KEYS}.penalty=none"
            )
        if actor.use_kl_loss and actor.kl_loss_type not in KL_TYPES:
            raise ValueError(
                f"actor_rollout_ref.actor.kl_loss_type must be one of {', '.join(KL_TYPES)} with "
                f"policy_loss.loss_mode={LOSS_MODE}, got {actor.kl_loss_type!r}"
            )
        low, high = (actor.clip_ratio if own is None else own for own in (actor.clip_ratio_low, actor.clip_ratio_high))
        return EPOConfig(
            clip_ratio_low=low,
            clip_ratio_high=high,
            clip_ratio_c=actor.clip_ratio_c,
            entropy_coeff=actor.entropy_coeff,
            kl_coeff=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
            kl_type=KL_TYPES[actor.kl_loss_type] if actor.use_kl_loss else "k3",
            loss_agg_mode="token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode,  # type: ignore[arg-type]
            **self._loss_keys(),
        )

    def _loss_keys(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("penalty", "penalty_alpha", "smooth_coeff", "band_scope")}
