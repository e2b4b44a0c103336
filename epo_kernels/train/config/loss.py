"""The settings of the loss, its entropy band, and the controller of the entropy coefficient."""

import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

import epo_kernels as ek
from epo_kernels.controller import ControllerRule
from epo_kernels.defaults import BAND
from epo_kernels.schedule import SCHEDULES
from epo_kernels.train.setting import NOT_NEGATIVE, ConfigError, at_least, one_of, require, setting

# Defaults of `ek.EntropyController`, and the loss settings that provide its arguments.
_CONTROLLER = {name: one.default for name, one in inspect.signature(ek.EntropyController).parameters.items()}
_CONTROLLER_SETTINGS = {
    "target": "entropy_target",
    "rule": "entropy_rule",
    "entropy_coeff": "entropy_coeff",
    "coeff_min": "entropy_coeff_min",
    "coeff_max": "entropy_coeff_max",
    "delta": "entropy_coeff_delta",
    "kp": "entropy_kp",
    "ki": "entropy_ki",
    "target_high": "entropy_target_high",
    "lr": "entropy_coeff_lr",
}


def _library(defaults: Any, name: str, text: str) -> Any:
    """A setting that takes its default and choices from a field of a library dataclass."""
    owner = defaults if isinstance(defaults, type) else type(defaults)
    kind = get_type_hints(owner)[name]
    listed = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    return setting(getattr(defaults, name), text, one_of(*get_args(listed[0])) if listed else None)


def _epo(name: str, text: str) -> Any:
    return _library(ek.EPOConfig, name, text)


def _band(name: str, text: str) -> Any:
    return _library(BAND, name, text)


@dataclass
class LossConfig:
    """The loss (`epo_kernels.EPOConfig`), its entropy band, and corrections for rollout mismatch.

    The band's defaults are `epo_kernels.defaults.BandDefaults`: the paper's hinge.
    """

    policy_loss: str = _epo("policy_loss", "policy-gradient loss")
    clip_ratio_low: float = setting(
        ek.EPOConfig.clip_ratio_low,
        "ppo, cispo, gspo: the ratio is clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; gmpo clips its log; "
        "dppo: allowed divergence",
    )
    clip_ratio_high: float = _epo("clip_ratio_high", "above clip_ratio_low: DAPO's clip-higher")
    clip_ratio_c: float | None = _epo("clip_ratio_c", "ppo, gspo: dual-clip bound; dppo: ratio bound; null: none")
    ratio_scope: str | None = _epo("ratio_scope", "tokens that share a ratio (segment: a turn); null: policy_loss's")
    ratio_gradient: str = _epo("ratio_gradient", "gradient of a shared ratio: per token (verl), or of the mean (TRL)")
    sapo_tau_pos: float = _epo("sapo_tau_pos", "sapo: temperature for positive advantages")
    sapo_tau_neg: float = _epo("sapo_tau_neg", "sapo: temperature for other advantages")
    dppo_divergence: str = _epo("dppo_divergence", "dppo: divergence of the trust region")
    vespo_k_pos: float = _epo("vespo_k_pos", "vespo: exponent k for nonnegative advantages")
    vespo_lambda_pos: float = _epo("vespo_lambda_pos", "vespo: decay lambda for nonnegative advantages")
    vespo_k_neg: float = _epo("vespo_k_neg", "vespo: exponent k for negative advantages")
    vespo_lambda_neg: float = _epo("vespo_lambda_neg", "vespo: decay lambda for negative advantages")
    entropy_coeff: float = _band("entropy_coeff", "weight of entropy bonus and band penalty (lambda)")
    entropy_target: float | None = setting(None, "target entropy per token (nats), held by entropy_coeff; null: none")
    entropy_rule: str = setting(
        "step",
        "how entropy_target adjusts entropy_coeff: step (TRL's adaptive entropy), pi (EntroPIC) or boxed (AEnt)",
        one_of(*get_args(ControllerRule)),
    )
    entropy_coeff_min: float = setting(_CONTROLLER["coeff_min"], "lower bound of entropy_coeff under entropy_target")
    entropy_coeff_max: float = setting(_CONTROLLER["coeff_max"], "upper bound of entropy_coeff under entropy_target")
    entropy_coeff_delta: float = setting(_CONTROLLER["delta"], "entropy_rule=step: size of a step", NOT_NEGATIVE)
    entropy_kp: float = setting(_CONTROLLER["kp"], "entropy_rule=pi: proportional gain", NOT_NEGATIVE)
    entropy_ki: float = setting(_CONTROLLER["ki"], "entropy_rule=pi: integral gain", NOT_NEGATIVE)
    entropy_target_high: float | None = setting(None, "entropy_rule=boxed: upper entropy; null: entropy_target")
    entropy_coeff_lr: float = setting(_CONTROLLER["lr"], "entropy_rule=boxed: change per nat outside it", NOT_NEGATIVE)
    kl_coeff: float = _epo("kl_coeff", "weight of the KL to the reference policy (the one before RL); 0 disables")
    kl_type: str = _epo("kl_type", "KL estimator")
    kl_bias_correction: bool = _epo("kl_bias_correction", "multiply the KL by the ratio: unbiased off-policy")
    penalty: str = _band("penalty", "penalty for entropy outside the band; none: no band")
    penalty_alpha: float = _band("penalty_alpha", "size of the penalty (alpha)")
    smooth_coeff: float = _band("smooth_coeff", "weight of the penalty within the entropy term (k)")
    band_scope: str = _band("band_scope", "compare each token's entropy with the band, or a turn's mean entropy")
    loss_agg_mode: str = _epo("loss_agg_mode", "aggregation of token losses")
    band_low: float = _band("band_low", "lower bound of the band, as a multiple of the mean past entropy (kappa_l)")
    band_high: float = _band("band_high", "upper bound of the band, as a multiple of the mean past entropy (kappa_r)")
    history_scope: str = _band("history_scope", "mean over each turn index, or over all turns")
    history_weighting: str = _band("history_weighting", "tokens, or steps, have equal weight in the mean")
    history_window: int | None = setting(BAND.history_window, "latest steps in the history; null: all", at_least(1))
    history_includes_current: bool = _band("history_includes_current", "include the current step in the history")
    phase_schedule: str = setting(BAND.phase_schedule, "schedule of the penalty weight", one_of(*SCHEDULES))
    phase_horizon: int | None = setting(
        BAND.phase_horizon, "steps that phase_schedule spans; null: schedule_steps", at_least(1)
    )
    rollout_is: str = setting(
        "auto",
        "importance weights for the mismatch between rollout and training; auto: token for vllm, else none",
        one_of("auto", "none", "token", "turn"),
    )
    rollout_is_cap: float = setting(2.0, "importance weights are truncated to this value; inf disables", at_least(1))

    def check(self) -> None:
        require(
            0 <= self.band_low <= self.band_high,
            "loss.band_low and loss.band_high must satisfy 0 <= band_low <= band_high, got "
            f"{self.band_low} and {self.band_high}",
        )
        require(
            self.penalty == "none" or self.entropy_coeff != 0 or self.entropy_target is not None,
            f"loss.penalty must be none with loss.entropy_coeff=0, which disables it, got {self.penalty!r}. Set "
            "loss.penalty=none, loss.entropy_coeff, or loss.entropy_target",
        )
        self.controller()

    def controller(self, device: torch.device | str = "cpu") -> ek.EntropyController | None:
        """The controller of entropy_coeff; None without a target.

        Raises:
            ConfigError: EntropyController rejects the settings.
        """
        if self.entropy_target is None:
            return None
        values = {argument: getattr(self, name) for argument, name in _CONTROLLER_SETTINGS.items()}
        try:
            return ek.EntropyController(**values, device=device)
        except (TypeError, ValueError) as error:
            known = rf"\b({'|'.join(_CONTROLLER_SETTINGS)})\b"
            message = re.sub(known, lambda found: f"loss.{_CONTROLLER_SETTINGS[found[0]]}", str(error))
            raise ConfigError(message) from error
