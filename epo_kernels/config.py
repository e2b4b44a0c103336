"""The settings of the loss: one frozen dataclass that checks itself."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, get_args

KLType = Literal["k1", "k2", "k3", "abs"]
Penalty = Literal["none", "hinge", "quadratic", "indicator", "gate"]
BandScope = Literal["token", "segment"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

# The range in which float32 keeps its whole precision: outside, a number or its reciprocal is 0 or inf.
FLOAT32_SMALLEST, FLOAT32_LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127

# The published settings of each environment (arXiv 2509.22576 and the launch lines of its repository).
_PAPER_ALPHA = {"scienceworld": 0.05, "alfworld": 0.1}


@dataclass(frozen=True)
class EPOConfig:
    """What the loss computes. Everything that a schedule moves can be overridden per call of `epo_loss`.

    Per token, with ratio r, advantage A, entropy H, band penalty P and phase weight β::

        pg   = max(-A r, -A clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high)),  bounded by -A clip_ratio_c where A < 0
        loss = is_weight pg - entropy_coeff (H - β smooth_coeff P) + kl_coeff KL

    Attributes:
        clip_ratio_low: ε_low of the clipped ratio, in [0, 1].
        clip_ratio_high: ε_high of the clipped ratio, >= 0; above ε_low it is DAPO's clip-higher.
        clip_ratio_c: bound of the dual clip for negative advantages (arXiv 1912.09729), > 1, or None for no dual clip.
        entropy_coeff: λ, the weight of the entropy bonus; 0 switches bonus and penalty off.
        kl_coeff: weight of the KL to the reference policy; 0 switches it off.
        kl_type: estimator of the KL: "k1", "k2", "k3" (verl's `low_var_kl`) or "abs" (|k1|).
        penalty: what happens outside the entropy band. "hinge" α·distance (the paper's second version), "quadratic"
            α·distance², "indicator" α as a constant (the published code; no gradient), "gate" (the bonus is multiplied
            by α outside the band), or "none".
        penalty_alpha: α, >= 0.
        smooth_coeff: k, the weight of the penalty inside the entropy term, >= 0.
        band_scope: "token" holds each token's entropy against its band, "segment" the mean entropy of its segment
            (a turn).
        loss_agg_mode: how tokens are weighed, with verl's names.
        temperature: the sampling temperature τ that logits are divided by, > 0.

    With the paper's numbers the hinge only shrinks the bonus above the band: the term in H is
    -λ(1 - αβk)H there, which still rewards entropy while αβk < 1. A band that restores needs αβk > 1
    (`EPOConfig.restoring`).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range; the message names it, what it must be and what it is.
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

    def __post_init__(self) -> None:
        self._check_range("clip_ratio_low", low=0.0, high=1.0)
        self._check_range("clip_ratio_high", low=0.0)
        if self.clip_ratio_c is not None:
            self._check_range("clip_ratio_c", low=1.0, open_low=True)
        self._check_range("entropy_coeff")
        self._check_range("kl_coeff", low=0.0)
        self._check_range("penalty_alpha", low=0.0)
        self._check_range("smooth_coeff", low=0.0)
        self._check_range("temperature", low=0.0, open_low=True)
        if not FLOAT32_SMALLEST <= self.temperature <= FLOAT32_LARGEST:
            raise ValueError(
                f"EPOConfig.temperature must be between {FLOAT32_SMALLEST:.3g} and {FLOAT32_LARGEST:.3g}, by which "
                f"float32 can divide, got {self.temperature!r}"
            )
        self._check_choice("kl_type", get_args(KLType))
        self._check_choice("penalty", get_args(Penalty))
        self._check_choice("band_scope", get_args(BandScope))
        self._check_choice("loss_agg_mode", get_args(LossAggMode))

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

        λ = 0.001, KL 0.01 (low_var_kl), α = 0.05 on ScienceWorld and 0.1 on ALFWorld. Take the band from
        `EntropyHistory(num_turns, weighting="step").bounds(turns, 0, 2)` and the phase weight from
        `phase_weight(step, total_steps, "paper")`.

        Args:
            env: "scienceworld" or "alfworld".
        """
        return cls(penalty="hinge", penalty_alpha=_paper_alpha(env), kl_coeff=0.01)

    @classmethod
    def published_code(cls, env: str = "scienceworld") -> EPOConfig:
        """What the paper's repository computes (September 2025): a constant outside the band, so without gradient.

        Its launch lines hold the band against single tokens (`entropy_smooth_mask_mode "token"`). Take the phase weight
        from `phase_weight(step, 150, "official")`: its code fixes the horizon at 150.

        Args:
            env: "scienceworld" or "alfworld".
        """
        return cls(penalty="indicator", penalty_alpha=_paper_alpha(env), kl_coeff=0.01)

    @classmethod
    def restoring(cls) -> EPOConfig:
        """A band that pushes back: αβk = 2 turns the bonus round above the band, and trebles it below (β = 1).

        This project's own setting, not the paper's; the band is held against a turn's mean entropy, because single
        tokens of a healthy policy are often certain.
        """
        return cls(penalty="hinge", penalty_alpha=2.0, band_scope="segment")


def _paper_alpha(env: str) -> float:
    if env not in _PAPER_ALPHA:
        raise ValueError(f"env must be one of {', '.join(_PAPER_ALPHA)}, got {env!r}")
    return _PAPER_ALPHA[env]
