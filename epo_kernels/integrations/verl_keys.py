"""The keys that EPO adds to verl's config, and the library config derived from them and from verl's own keys."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from epo_kernels.config import BandScope, EPOConfig, KLType, Penalty, PolicyLossName
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

# verl's policy losses, and the library's policy loss that computes each.
POLICY_LOSSES: dict[str, PolicyLossName] = {
    "vanilla": "ppo",
    "dppo_tv": "dppo",
    "dppo_kl": "dppo",
    "gspo": "gspo",
    "sapo": "sapo",
    "gpg": "reinforce",
    "geo_mean": "gmpo",
    "cispo": "cispo",
    "clip_cov": "ppo",
    "kl_cov": "ppo",
}
# The library's names that differ from verl's.
POLICY_LOSS_ALIASES = {"ppo": "vanilla", "dppo": "dppo_tv", "reinforce": "gpg", "gmpo": "geo_mean"}
UNBOUNDED = 1e30  # above every possible ratio: the library clamps log-ratios at 20


@dataclass(frozen=True)
class EPOSettings:
    """The keys under `actor_rollout_ref.actor.policy_loss.epo`; see `EPOConfig` and `EntropyHistory` for the maths.

    The defaults are `epo_kernels.defaults.BandDefaults`, the paper's hinge. A step's band uses earlier steps only.

    Attributes:
        policy_loss: name of a policy loss in verl (`POLICY_LOSSES`) or in the library (`POLICY_LOSS_ALIASES`). Its
            parameters are verl's keys: clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg, and under
            policy_loss clip_cov_ratio, clip_cov_lb, clip_cov_ub, kl_cov_ratio and ppo_kl_coef.
        penalty, penalty_alpha, smooth_coeff, band_scope: as in `EPOConfig`.
        band_low: κ_l: the band's lower bound as a multiple of the historical mean entropy.
        band_high: κ_r: the upper bound.
        num_turns: number of distinct turns in the history; a batch with more raises an error.
        turns: "response_mask" (the turns of a response are the runs of 1s), or the name of an integer field of the
            batch, with one value per sample (if each turn is a separate sample) or per response token.
        history_scope, history_weighting: scope and weighting of `EntropyHistory`.
        history_window: number of steps used; None: all.
        phase_schedule: schedule of the penalty weight, see `phase_weight`.
        phase_horizon: number of steps it spans; None: verl's total_training_steps.
    """

    policy_loss: str = "vanilla"
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
        if self.policy_loss not in (*POLICY_LOSSES, *POLICY_LOSS_ALIASES):
            aliases = ", ".join(f"{own} ({name})" for own, name in POLICY_LOSS_ALIASES.items())
            raise ValueError(
                f"{KEYS}.policy_loss must be one of {', '.join(POLICY_LOSSES)}, or the library's names {aliases}; got "
                f"{self.policy_loss!r}"
            )
        EPOConfig(**self._loss_keys())
        self.make_history().bounds(torch.zeros(0, dtype=torch.int64), self.band_low, self.band_high)
        phase_weight(0, 1 if self.phase_horizon is None else self.phase_horizon, self.phase_schedule)

    @classmethod
    def of(cls, keys: Mapping[str, Any] | None) -> EPOSettings:
        """The settings from a config's keys.

        Raises:
            ValueError: an unknown key (with a suggestion), or a value out of range.
            TypeError: a value of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in keys or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"{KEYS}.{key} is no key of EPO; {hint}")
        return cls(**(keys or {}))

    @property
    def verl_policy_loss(self) -> str:
        """The policy loss under verl's name."""
        return POLICY_LOSS_ALIASES.get(self.policy_loss, self.policy_loss)

    def make_history(self) -> EntropyHistory:
        return EntropyHistory(self.num_turns, self.history_window, self.history_scope, self.history_weighting)

    def loss_config(self, actor: Any, loss_agg_mode: str) -> EPOConfig:
        """The library's config from these keys and from verl's ActorConfig.

        Raises:
            ValueError: an unsupported combination; the message names verl's key.
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
        return EPOConfig(
            **self._policy_keys(actor),
            entropy_coeff=actor.entropy_coeff,
            kl_coeff=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
            kl_type=KL_TYPES[actor.kl_loss_type] if actor.use_kl_loss else "k3",
            loss_agg_mode="token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode,  # type: ignore[arg-type]
            **self._loss_keys(),
        )

    def _policy_keys(self, actor: Any) -> dict[str, Any]:
        """The policy loss and its parameters, from verl's keys."""
        name = self.verl_policy_loss
        low, high = clip_range(actor)
        return {
            "policy_loss": POLICY_LOSSES[name],
            # verl's kl_cov has no clip; the dual clip exists only in its vanilla loss, and as dppo's ratio bound.
            "clip_ratio_low": 1.0 if name == "kl_cov" else low,
            "clip_ratio_high": UNBOUNDED if name == "kl_cov" else high,
            "clip_ratio_c": actor.clip_ratio_c if name in ("vanilla", "dppo_tv", "dppo_kl") else None,
            "sapo_tau_pos": actor.tau_pos,
            "sapo_tau_neg": actor.tau_neg,
            "dppo_divergence": "kl" if name == "dppo_kl" else "tv",
        }

    def _loss_keys(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("penalty", "penalty_alpha", "smooth_coeff", "band_scope")}


def clip_range(actor: Any) -> tuple[float, float]:
    """ε_low and ε_high of verl's ActorConfig."""
    low, high = (actor.clip_ratio if own is None else own for own in (actor.clip_ratio_low, actor.clip_ratio_high))
    return low, high


def check_shares(policy_loss: Any) -> None:
    """Raise ValueError unless every share of tokens in verl's PolicyLossConfig is in (0, 1]."""
    for name in ("clip_cov_ratio", "kl_cov_ratio"):
        share = getattr(policy_loss, name)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"actor_rollout_ref.actor.policy_loss.{name} must be in (0, 1], got {share!r}")
