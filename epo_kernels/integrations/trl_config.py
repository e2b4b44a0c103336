"""The settings of `EPOTrainer`: TRL's own and the band's, and what they are for the library."""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from trl import GRPOConfig

import epo_kernels as ek
from epo_kernels.config import BandScope, Penalty
from epo_kernels.defaults import BAND
from epo_kernels.history import HistoryScope, HistoryWeighting

MAX_TURNS = 1024  # of a sequence, in the history; each costs 16 bytes

Family = Literal["clipped", "cispo", "sapo", "vespo"]

# The policy loss of a token by TRL's loss_type, which names its aggregation as well.
FAMILIES: dict[str, Family] = {
    "grpo": "clipped",
    "bnpo": "clipped",
    "dr_grpo": "clipped",
    "dapo": "clipped",
    "luspo": "clipped",
    "cispo": "cispo",
    "sapo": "sapo",
    "vespo": "vespo",
}

# TRL's names of EPOConfig's fields, for error messages.
_TRL_NAMES = {
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "delta",
    "entropy_coeff": "entropy_coef",
    "sapo_tau_pos": "sapo_temperature_pos",
    "sapo_tau_neg": "sapo_temperature_neg",
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EPOTrainerConfig(GRPOConfig):
    """`GRPOConfig` with the settings of the entropy band.

    TRL's settings keep their names and meanings; entropy_coef (with use_adaptive_entropy, as it moves) weighs the
    entropy bonus and the band penalty. The fields added here configure the band and its history; their defaults are
    `epo_kernels.defaults.BandDefaults`, the paper's hinge. docs/trl.md lists what is supported and how it maps to
    `EPOConfig`; docs/entropy_control.md compares the penalties.

    Raises:
        ValueError: an unsupported option or a value out of range; the message says what to set instead.
    """

    entropy_coef: float = _setting(
        BAND.entropy_coeff, "Weight of the entropy bonus and the band penalty. 0 disables both."
    )
    penalty: str = _setting(
        BAND.penalty,
        "Penalty for entropy outside the band: none, hinge, quadratic, indicator or gate; see EPOConfig.",
    )
    penalty_alpha: float = _setting(
        BAND.penalty_alpha, "Size of the penalty; for gate, the factor of the entropy bonus outside the band."
    )
    smooth_coeff: float = _setting(BAND.smooth_coeff, "Weight of the penalty within the entropy term.")
    band_scope: str = _setting(
        BAND.band_scope, "What is compared with the band: token (each token's entropy) or segment (a turn's mean)."
    )
    band_low: float = _setting(BAND.band_low, "Lower bound of the band, as a multiple of the historical mean entropy.")
    band_high: float = _setting(
        BAND.band_high, "Upper bound of the band, as a multiple of the historical mean entropy."
    )
    history_scope: str = _setting(
        BAND.history_scope, "Historical mean of each turn index (turn), or of all turns (global)."
    )
    history_weighting: str = _setting(
        BAND.history_weighting, "What has equal weight in the historical mean: token, or step (a generation)."
    )
    history_window: int | None = _setting(
        BAND.history_window, "Number of most recent generations in the history; None for all."
    )
    history_includes_current: bool = _setting(
        BAND.history_includes_current,
        "Include the current generation in the history; costs a scoring pass where TRL makes none.",
    )
    phase_schedule: str = _setting(
        BAND.phase_schedule, "Schedule of the penalty weight over training: constant, paper or official."
    )
    phase_horizon: int | None = _setting(
        BAND.phase_horizon, "Optimizer steps that phase_schedule spans; None for the whole run."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epo_config()
        self.new_history().bounds(torch.zeros(1, dtype=torch.int64), self.band_low, self.band_high)
        self.phase_weight(0, 1)

    @property
    def family(self) -> Family:
        """The policy loss that loss_type stands for, apart from its aggregation."""
        return FAMILIES[self.loss_type]

    @property
    def clip_high(self) -> float:
        """epsilon_high, with None resolved to epsilon."""
        return cast(float, self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def sequence_level(self) -> bool:
        """Whether the tokens of a sequence share an importance ratio."""
        return bool(self.importance_sampling_level == "sequence")

    @property
    def needs_scores_first(self) -> bool:
        """Whether the loss needs the log-probs or entropies of the whole micro-batch before its first gradient."""
        return bool(self.beta != 0.0 or self.top_entropy_quantile < 1.0 or self.off_policy_mask_threshold is not None)

    def epo_config(self) -> ek.EPOConfig:
        """The library's config; `token-mean`, because the weights of TRL's loss_type multiply the advantages.

        Raises:
            ValueError: see above.
        """
        for wrong, message in self._refusals():
            if wrong:
                raise ValueError(message)
        try:
            return ek.EPOConfig(
                entropy_coeff=self.entropy_coef,
                penalty=cast(Penalty, self.penalty),
                penalty_alpha=self.penalty_alpha,
                smooth_coeff=self.smooth_coeff,
                band_scope=cast(BandScope, self.band_scope),
                temperature=self.temperature,
                **self._policy_fields(),
            )
        except (TypeError, ValueError) as error:
            message = str(error)
            for name, trl_name in _TRL_NAMES.items():
                message = message.replace(f"EPOConfig.{name} ", f"{trl_name} ")
            raise type(error)(message.replace("EPOConfig.", "")) from error

    def _policy_fields(self) -> dict[str, Any]:
        """The fields of EPOConfig that define TRL's policy loss."""
        scope = {"ratio_scope": "sequence", "ratio_gradient": "sequence"} if self.sequence_level else {}
        if self.family == "cispo":  # TRL bounds the ratio at epsilon_high itself, and not from below
            return {"policy_loss": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": self.clip_high - 1.0, **scope}
        if self.family == "sapo":
            taus = {"sapo_tau_pos": self.sapo_temperature_pos, "sapo_tau_neg": self.sapo_temperature_neg}
            return {"policy_loss": "sapo", **taus, **scope}
        if self.family == "vespo":  # its weight is always a sequence's
            powers = {name: getattr(self, name) for name in ("vespo_k_pos", "vespo_k_neg")}
            decays = {name: max(getattr(self, name), 1e-4) for name in ("vespo_lambda_pos", "vespo_lambda_neg")}
            return {"policy_loss": "vespo", **powers, **decays}
        high, ceiling = self.clip_high, self.delta
        if self.delta is not None:  # below 1 + epsilon_high it lowers the upper clip; the dual clip is then the clip's
            high, ceiling = min(high, self.delta - 1.0), max(self.delta, 1.0 + high)
        clip = {"clip_ratio_low": self.epsilon, "clip_ratio_high": high, "clip_ratio_c": ceiling}
        return {"policy_loss": "gspo" if self.sequence_level else "ppo", **clip, **scope}

    def new_history(self) -> ek.EntropyHistory:
        return ek.EntropyHistory(
            MAX_TURNS,
            self.history_window,
            cast(HistoryScope, self.history_scope),
            cast(HistoryWeighting, self.history_weighting),
        )

    def new_controller(self) -> ek.EntropyController | None:
        """What moves entropy_coef with use_adaptive_entropy, else None. Its state is the trainer's to load."""
        if not self.use_adaptive_entropy:
            return None
        return ek.EntropyController(
            self.entropy_target,
            "step",
            entropy_coeff=self.entropy_coef_min,  # TRL's initial value may be outside the bounds
            coeff_min=self.entropy_coef_min,
            coeff_max=self.entropy_coef_max,
            delta=self.entropy_coef_delta,
            device=self.device,
        )

    def phase_weight(self, step: int, total_steps: int) -> float:
        """β of the penalty at an optimizer step of a run of that many."""
        return ek.phase_weight(step, self.phase_horizon or max(total_steps, 1), self.phase_schedule)

    def _refusals(self) -> list[tuple[bool, str]]:
        """(whether it applies, message) of everything that the library does not check itself."""
        levels = ("token", "sequence")
        return [
            (
                self.loss_type not in FAMILIES,
                f"loss_type must be one of {', '.join(FAMILIES)}, got {self.loss_type!r}",
            ),
            (
                self.importance_sampling_level not in levels,
                f"importance_sampling_level must be one of {', '.join(levels)}, got {self.importance_sampling_level!r}",
            ),
            (
                self.delta is not None and not self.delta > 1.0,
                f"delta must be above 1, or it would clip the ratio of an unchanged policy, got {self.delta}; "
                "set delta=None for no bound",
            ),
            (
                self.top_entropy_quantile < 1.0 and self.penalty != "none" and self.band_scope == "segment",
                "band_scope must be 'token' with top_entropy_quantile < 1, because the mean entropy of a turn needs "
                "all its tokens, got 'segment'; set band_scope='token', penalty='none' or top_entropy_quantile=1.0",
            ),
            (
                self.use_adaptive_entropy and self.entropy_coef_min > self.entropy_coef_max,
                f"entropy_coef_min must be at most entropy_coef_max = {self.entropy_coef_max}, "
                f"got {self.entropy_coef_min}",
            ),
            (
                self.torch_compile,
                "torch_compile must be False, because the loss runs inside the model's forward, got True; set "
                "torch_compile=False",
            ),
        ]
