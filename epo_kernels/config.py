"""The settings of the loss: one frozen dataclass that validates itself."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, get_args

from epo_kernels.declaration import KLType, LossAggMode, Penalty, PolicyLossName

BandScope = Literal["token", "segment"]
RatioScope = Literal["token", "sequence", "segment"]
RatioGradient = Literal["token", "sequence"]
Divergence = Literal["tv", "kl"]

# The ratio scopes that each policy loss supports; the first is the default.
_RATIO_SCOPES: dict[PolicyLossName, tuple[RatioScope, ...]] = {
    "ppo": ("token",),
    "cispo": ("token", "sequence", "segment"),
    "sapo": ("token", "sequence", "segment"),
    "reinforce": ("token",),
    "dppo": ("token",),
    "gspo": ("sequence", "segment"),
    "vespo": ("sequence", "segment"),
    "gmpo": ("sequence", "segment"),
}

# The range in which float32 has full precision; outside it, a number or its reciprocal becomes 0 or inf.
FLOAT32_SMALLEST, FLOAT32_LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127

# The published settings of each environment (arXiv 2509.22576 and the launch lines of its repository).
_PAPER_ALPHA = {"scienceworld": 0.05, "alfworld": 0.1}


@dataclass(frozen=True)
class EPOConfig:
    """Settings of the loss. Everything that a schedule changes can be overridden per call of `epo_loss`.

    Per token, with policy loss pg, entropy H, band penalty P and phase weight β::

        loss = is_weight pg - entropy_coeff (H - β smooth_coeff P) + kl_coeff KL

    pg is one of the following (`epo_kernels.reference` has the details), with ratio r, advantage A, sequence ratio s
    and stop-gradient sg::

        ppo        max(-A r, -A clip(r)),  bounded by -A clip_ratio_c where A < 0
        cispo      -A sg(clip(r)) log_prob
        sapo       -A 4/τ sigmoid(τ (r - 1))
        reinforce  -A log_prob
        dppo       -A sg(min(r, clip_ratio_c)) log_prob inside a trust region, 0 outside
        gspo       ppo with s in place of r
        vespo      -A φ(w) log_prob, w the product of the sequence's ratios
        gmpo       -A s, the mean A and the geometric mean of the clipped ratios

    Attributes:
        clip_ratio_low: ε_low, >= 0. "ppo" and "gspo" clip the ratio at 1 - ε_low and require ε_low <= 1. "cispo" clips
            there too; 1 or more means no lower bound. For "dppo", the allowed divergence if A <= 0. "gmpo" clips
            log-ratios at -ε_low.
        clip_ratio_high: ε_high, >= 0. "ppo", "gspo" and "cispo" clip the ratio at 1 + ε_high ("cispo" accepts values
            down to -1, which give an upper bound below 1). A value above ε_low is DAPO's clip-higher. For "dppo", the
            allowed divergence if A > 0. "gmpo" clips log-ratios at ε_high.
        clip_ratio_c: > 1, or None for no bound. "ppo" and "gspo": dual-clip bound for negative advantages (arXiv
            1912.09729). "dppo": upper bound of the ratio; its authors recommend 20. Unused by other losses.
        entropy_coeff: λ, the weight of the entropy bonus; 0 disables bonus and penalty.
        kl_coeff: weight of the KL to the reference policy; 0 disables it.
        kl_type: KL estimator: "k1", "k2", "k3" (verl's `low_var_kl`) or "abs" (|k1|).
        penalty: penalty outside the entropy band. "hinge": α·distance (the paper's second version). "quadratic":
            α·distance². "indicator": the constant α, without gradient (the published code). "gate": multiplies the
            bonus by α outside the band. "none": no penalty.
        penalty_alpha: α, >= 0.
        smooth_coeff: k, the weight of the penalty inside the entropy term, >= 0.
        band_scope: "token" compares each token's entropy with its band, "segment" the mean entropy of its segment
            (a turn).
        loss_agg_mode: how token losses are aggregated, with verl's names: "token-mean" divides by all tokens,
            "seq-mean-token-sum" by the sequences, "seq-mean-token-mean" takes the mean within each sequence first,
            "seq-mean-token-sum-norm" divides the sum by the sequences and a fixed length.
        temperature: sampling temperature τ that divides the logits, > 0.
        policy_loss: "ppo"; "cispo" (arXiv 2506.13585); "sapo" (arXiv 2511.20347); "reinforce" (verl's `gpg`); "dppo"
            (arXiv 2602.04879); "gspo" (arXiv 2507.18071), whose clip ranges are usually near 3e-4; "vespo" (arXiv
            2602.10693); "gmpo" (arXiv 2507.20673, verl's `geo_mean`).
        ratio_scope: the tokens that share a ratio: "token", "sequence", or "segment" (a turn, by segment_ids). None
            selects the default of the policy loss: "sequence" for "gspo", "vespo" and "gmpo", otherwise "token".
            "cispo" and "sapo" support all three.
        ratio_gradient: gradient of a sequence ratio; applies to "gspo", and with a wider ratio_scope to "sapo" and the
            bias-corrected KL of "cispo". "token" propagates each token's loss to its own log-prob only (verl);
            "sequence" is the derivative of the mean (TRL). They agree if advantage, weight and is_weight are constant
            within each sequence.
        sapo_tau_pos, sapo_tau_neg: τ of "sapo" for A > 0 and for A <= 0; > 0.
        dppo_divergence: trust region of "dppo": "tv" bounds the change of the token's probability, "kl" the KL
            divergence of the binary distribution (this token or any other).
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k >= 0 and λ > 0 of "vespo", with
            φ(w) = w^k exp(λ (1 - w)), for A >= 0 and for A < 0.
        kl_bias_correction: multiplies the KL by the ratio (for "vespo" and "gmpo", the token's own ratio), which makes
            its gradient unbiased off-policy (DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`).

    With the paper's numbers the hinge only shrinks the bonus above the band: the term in H is
    -λ(1 - αβk)H there, which still rewards entropy while αβk < 1. A restoring band needs αβk > 1
    (`EPOConfig.restoring`).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range or incompatible with another; the message names the field, the allowed
            values and the value given.
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = 3.0
    entropy_coeff: float = 1e-3
    kl_coeff: float = 0.0
    kl_type: KLType = "k3"
    penalty: Penalty = "none"
    penalty_alpha: float = 0.1
    smooth_coeff: float = 1.0
    band_scope: BandScope = "token"
    loss_agg_mode: LossAggMode = "token-mean"
    temperature: float = 1.0
    policy_loss: PolicyLossName = "ppo"
    ratio_scope: RatioScope | None = None
    ratio_gradient: RatioGradient = "token"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    dppo_divergence: Divergence = "tv"
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_bias_correction: bool = False

    def __post_init__(self) -> None:
        self._check_choice("policy_loss", get_args(PolicyLossName))
        self._check_range("clip_ratio_low", low=0.0, high=1.0 if self.policy_loss in ("ppo", "gspo") else math.inf)
        self._check_range("clip_ratio_high", low=-1.0 if self.policy_loss == "cispo" else 0.0)
        if self.clip_ratio_high < -self.clip_ratio_low:
            raise ValueError(
                f"EPOConfig.clip_ratio_high must be >= -clip_ratio_low ({-self.clip_ratio_low!r}), otherwise the ratio "
                f"bounds cross, got {self.clip_ratio_high!r}; clip_ratio_low=1.0 removes the lower bound"
            )
        if self.clip_ratio_c is not None:
            self._check_range("clip_ratio_c", low=1.0, open_low=True)
        self._check_range("entropy_coeff")
        self._check_range("kl_coeff", low=0.0)
        self._check_range("penalty_alpha", low=0.0)
        self._check_range("smooth_coeff", low=0.0)
        self._check_range("temperature", low=0.0, open_low=True)
        if not FLOAT32_SMALLEST <= self.temperature <= FLOAT32_LARGEST:
            raise ValueError(
                f"EPOConfig.temperature must be between {FLOAT32_SMALLEST:.3g} and {FLOAT32_LARGEST:.3g}, so that "
                f"float32 can divide by it, got {self.temperature!r}"
            )
        self._check_choice("kl_type", get_args(KLType))
        self._check_choice("penalty", get_args(Penalty))
        self._check_choice("band_scope", get_args(BandScope))
        self._check_choice("loss_agg_mode", get_args(LossAggMode))
        self._check_policy_loss()

    def _check_policy_loss(self) -> None:
        for name in ("sapo_tau_pos", "sapo_tau_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            self._check_range(name, low=0.0, open_low=True)
        for name in ("vespo_k_pos", "vespo_k_neg"):
            self._check_range(name, low=0.0)
        self._check_choice("dppo_divergence", get_args(Divergence))
        self._check_choice("ratio_gradient", get_args(RatioGradient))
        if not isinstance(self.kl_bias_correction, bool):
            kind = type(self.kl_bias_correction).__name__
            raise TypeError(f"EPOConfig.kl_bias_correction must be a bool, got {self.kl_bias_correction!r} ({kind})")
        scopes = _RATIO_SCOPES[self.policy_loss]
        if self.ratio_scope is not None and self.ratio_scope not in scopes:
            hint = "; policy_loss='gspo' is the variant with a sequence ratio" if self.policy_loss == "ppo" else ""
            raise ValueError(
                f"EPOConfig.ratio_scope must be None or one of {', '.join(scopes)} with "
                f"policy_loss={self.policy_loss!r}, got {self.ratio_scope!r}{hint}"
            )
        if self.ratio_gradient == "sequence" and (
            self.policy_loss not in ("gspo", "sapo", "cispo") or self.is_per_token
        ):
            raise ValueError(
                "EPOConfig.ratio_gradient must be 'token' if no gradient flows through a sequence ratio, got "
                f"'sequence' with policy_loss={self.policy_loss!r} and ratio_scope={self.ratio_scope!r}; use "
                "policy_loss='gspo', or 'sapo' or 'cispo' with ratio_scope='sequence'"
            )

    @property
    def ratio_unit(self) -> RatioScope:
        """`ratio_scope`, with None resolved to the policy loss's default."""
        return _RATIO_SCOPES[self.policy_loss][0] if self.ratio_scope is None else self.ratio_scope

    @property
    def is_per_token(self) -> bool:
        """Whether each token's policy loss depends only on that token, not on a statistic of its sequence."""
        return self.ratio_unit == "token"

    def _check_range(self, name: str, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"EPOConfig.{name} must be a number, got {value!r} ({type(value).__name__})")
        number = float(value)
        below = number <= low if open_low else number < low
        if not math.isfinite(number) or below or number > high:
            bounds = f"in {'(' if open_low else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
            wanted = "finite" if low == -math.inf and high == math.inf else f"finite and {bounds}"
            raise ValueError(f"EPOConfig.{name} must be {wanted}, got {value!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"EPOConfig.{name} must be one of {', '.join(choices)}, got {value!r}")

    @classmethod
    def paper(cls, env: str = "scienceworld") -> EPOConfig:
        """The paper's second version (arXiv 2509.22576v2, February 2026): a hinge around the entropy history.

        λ = 0.001, KL 0.01 (low_var_kl), α = 0.05 on ScienceWorld and 0.1 on ALFWorld. The KL needs `ref_log_probs` in
        every call; `dataclasses.replace(cfg, kl_coeff=0.0)` turns it off. Take the band from
        `EntropyHistory(num_turns, weighting="step").bounds(turns, 0, 2)` and the phase weight from
        `phase_weight(step, total_steps, "paper")`.

        Args:
            env: "scienceworld" or "alfworld".
        """
        return cls(penalty="hinge", penalty_alpha=_paper_alpha(env), kl_coeff=0.01)

    @classmethod
    def published_code(cls, env: str = "scienceworld") -> EPOConfig:
        """What the paper's repository computes (September 2025): a constant penalty outside the band, without gradient.

        Its launch scripts compare the band with single tokens (`entropy_smooth_mask_mode "token"`). Take the phase
        weight from `phase_weight(step, 150, "official")`: its code fixes the horizon at 150.

        Args:
            env: "scienceworld" or "alfworld".
        """
        return cls(penalty="indicator", penalty_alpha=_paper_alpha(env), kl_coeff=0.01)

    @classmethod
    def restoring(cls) -> EPOConfig:
        """A band that pushes entropy back: αβk = 2 reverses the bonus above the band and triples it below (β = 1).

        This is the project's own setting, not the paper's. The band applies to a turn's mean entropy, because single
        tokens of a healthy policy often have near-zero entropy.
        """
        return cls(penalty="hinge", penalty_alpha=2.0, band_scope="segment")


def _paper_alpha(env: str) -> float:
    if env not in _PAPER_ALPHA:
        raise ValueError(f"env must be one of {', '.join(_PAPER_ALPHA)}, got {env!r}")
    return _PAPER_ALPHA[env]
