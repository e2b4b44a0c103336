"""The entropy controller: adapts the entropy coefficient λ so that the policy's entropy reaches a target."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from epo_kernels.inputs import as_scalar
from epo_kernels.metrics import LossMetrics

ControllerRule = Literal["step", "pi", "boxed"]


class EntropyController:
    """Adapts λ for `epo_loss(..., entropy_coeff=controller.entropy_coeff)` to the entropy measured at each update.

    `entropy_coeff` is a single 0-d float32 tensor for the whole run, updated in place, so a compiled loss is not
    recompiled and nothing syncs. Call `update` once after each optimizer update. H is the mean token entropy of that
    update, and clip is to [coeff_min, coeff_max]. By `rule`::

        step    c = min(c + delta, coeff_max) if H <= target else max(c - delta, coeff_min)
                λ = c if H <= target else 0, and 0 before the first update
        pi      e = target - H,  I = I + e,  λ = clip(c + kp e + ki I),  c the initial coefficient
        boxed   λ = clip(λ - lr (min(0, H - target) + max(0, H - target_high)))

    Sources:

    - "step": Skywork-OR1 (arXiv 2505.22312) as TRL implements it (`use_adaptive_entropy`; `entropy_coef_delta`,
      `entropy_coef_min`, `entropy_coef_max`, `entropy_target`), including its gate.
    - "pi": EntroPIC (arXiv 2511.15248). There α = kp (H - target) + ki Σ(H - target), in [-1, 1] with kp = 1 and
      ki = 0.01, weights positive and negative samples. Here the same controller, with the opposite sign, moves λ
      around its initial value. Three choices are ours: the sum includes the current error (the paper's code adds it
      afterwards); the integral is clamped so that c + ki I stays within the bounds (the paper's code has no
      anti-windup); the default gains are 100 and 10 times smaller, because λ is smaller than α.
    - "boxed": AEnt (arXiv 2509.03493), with lr, bounds and both entropies as in its code (lr 0.001,
      [1e-5, 0.01], entropies 0.1 and 0.5). Its clamped entropy, over part of the vocabulary, is not used.

    An update without tokens, or with a non-finite entropy, changes nothing.

    Args:
        target: target entropy in nats per token; for "boxed", the lower bound.
        rule: see above.
        entropy_coeff: initial coefficient, in [coeff_min, coeff_max].
        coeff_min: lower bound of the coefficient.
        coeff_max: upper bound of the coefficient.
        delta: step size of "step", >= 0.
        kp: proportional gain of "pi", >= 0.
        ki: integral gain of "pi", >= 0.
        target_high: upper bound of the entropy for "boxed", >= target; None: equal to target.
        lr: step size of "boxed", >= 0.
        device: device of `entropy_coeff`; use the device of the loss.

    Attributes:
        entropy_coeff: λ, 0-d float32. Read-only: do not assign to it.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        target: float,
        rule: ControllerRule = "step",
        *,
        entropy_coeff: float = 0.0,
        coeff_min: float = 0.0,
        coeff_max: float = 1.0,
        delta: float = 0.005,
        kp: float = 0.01,
        ki: float = 0.001,
        target_high: float | None = None,
        lr: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        if rule not in get_args(ControllerRule):
            raise ValueError(f"rule must be one of {', '.join(get_args(ControllerRule))}, got {rule!r}")
        self.rule = rule
        self.target = _number("target", target)
        self.target_high = self.target if target_high is None else _number("target_high", target_high)
        if self.target_high < self.target:
            raise ValueError(f"target_high must be at least target={self.target}, got {self.target_high}")
        self.coeff_min, self.coeff_max = _number("coeff_min", coeff_min), _number("coeff_max", coeff_max)
        self.initial = _number("entropy_coeff", entropy_coeff)
        if not self.coeff_min <= self.initial <= self.coeff_max:
            raise ValueError(
                f"entropy_coeff must be in [coeff_min, coeff_max] = [{self.coeff_min}, {self.coeff_max}], "
                f"got {self.initial}"
            )
        self.delta, self.lr = _number("delta", delta, low=0.0), _number("lr", lr, low=0.0)
        self.kp, self.ki = _number("kp", kp, low=0.0), _number("ki", ki, low=0.0)
        # The coefficient before gating, the last entropy, and the accumulated error, in float64.
        self._coeff = torch.full((), self.initial, dtype=torch.float64, device=device)
        self._entropy = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._integral = torch.zeros((), dtype=torch.float64, device=device)
        self.entropy_coeff = torch.zeros((), dtype=torch.float32, device=device)
        self._apply()

    @torch.no_grad()
    def update(
        self,
        entropy: Tensor | LossMetrics,
        mask: Tensor | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Adapt λ to the entropy of one optimizer update. No sync if `entropy` is on the controller's device.

        Args:
            entropy: the loss's metrics, summed over micro-batches (`out.metrics`); or per-token entropies, float, any
                shape.
            mask: shaped like entropy, bool or 0/1; entropies are not read where it is 0. None: every token counts.
                Only valid with a tensor.
            group: the ranks that share the update: sums and counts are all-reduced, so λ is the same on all of them.
                Metrics that are already all-reduced give the same mean. None: this process only, with a warning if
                there are other ranks.

        Raises:
            ValueError: shapes differ, or a mask was given with metrics.
            TypeError: entropy is neither `LossMetrics` nor a floating-point tensor.
        """
        sums = _sums(entropy, mask)
        if group is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            warnings.warn(
                "EntropyController.update without a group uses only this rank's entropy, so each rank gets its own "
                "coefficient; pass group=torch.distributed.group.WORLD to share one across ranks",
                stacklevel=2,
            )
        if group is not None:
            if torch.distributed.get_backend(group) == "nccl":
                sums = sums.to("cuda")
            torch.distributed.all_reduce(sums, group=group)
        sums = sums.to(self._coeff.device)
        mean = sums[0] / sums[1]
        counts = (sums[1] > 0) & mean.isfinite()
        coeff, integral = self._moved(mean)
        self._coeff.copy_(torch.where(counts, coeff, self._coeff))
        self._integral.copy_(torch.where(counts, integral, self._integral))
        self._entropy.copy_(torch.where(counts, mean, self._entropy))
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The rule and three numbers, loadable with `torch.load(weights_only=True)`. Settings are not included."""
        return {
            "rule": self.rule,
            "coeff": float(self._coeff),
            "entropy": float(self._entropy),
            "integral": float(self._integral),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; target, bounds and gains keep this controller's values.

        Raises:
            ValueError: the state was saved with another rule.
        """
        if state["rule"] != self.rule:
            raise ValueError(
                f"rule must match the saved controller's {state['rule']!r}, got {self.rule!r}; build it with that rule"
            )
        self._coeff.fill_(state["coeff"])
        self._entropy.fill_(state["entropy"])
        self._integral.fill_(state["integral"])
        self._apply()

    def _moved(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """(coefficient before gating, integral) after an update with that mean entropy."""
        if self.rule == "step":
            up = (self._coeff + self.delta).clamp(max=self.coeff_max)
            down = (self._coeff - self.delta).clamp(min=self.coeff_min)
            return torch.where(mean <= self.target, up, down), self._integral
        if self.rule == "boxed":
            outside = (mean - self.target).clamp(max=0.0) + (mean - self.target_high).clamp(min=0.0)
            return (self._coeff - self.lr * outside).clamp(self.coeff_min, self.coeff_max), self._integral
        error = self.target - mean
        integral = self._integral + error
        if self.ki > 0:
            low, high = self.coeff_min - self.initial, self.coeff_max - self.initial
            integral = integral.clamp(low / self.ki, high / self.ki)
        free = self.initial + self.kp * error + self.ki * integral
        return free.clamp(self.coeff_min, self.coeff_max), integral

    def _apply(self) -> None:
        """Recompute λ from the state, in place."""
        gate = self._entropy <= self.target if self.rule == "step" else torch.ones_like(self._coeff, dtype=torch.bool)
        self.entropy_coeff.copy_(torch.where(gate, self._coeff, 0.0))


def _number(name: str, value: float, low: float = -math.inf) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")
    return float(as_scalar(name, value, low=low))


def _sums(entropy: Tensor | LossMetrics, mask: Tensor | None) -> Tensor:
    """(2,) float64: sum and number of the counted entropies."""
    if isinstance(entropy, LossMetrics):
        if mask is not None:
            raise ValueError("mask must be None if entropy is LossMetrics, which already count their tokens")
        return torch.stack([entropy.entropy_sum, entropy.tokens]).detach()
    if not isinstance(entropy, Tensor) or not entropy.is_floating_point():
        kind = entropy.dtype if isinstance(entropy, Tensor) else type(entropy).__name__
        raise TypeError(f"entropy must be a floating-point tensor or LossMetrics, got {kind}")
    counted = torch.ones_like(entropy, dtype=torch.bool)
    if mask is not None:
        if mask.shape != entropy.shape:
            raise ValueError(f"mask must have the shape of entropy {tuple(entropy.shape)}, got {tuple(mask.shape)}")
        counted = mask != 0
    values = torch.where(counted, entropy.detach().double(), 0.0)
    return torch.stack([values.sum(), counted.sum().double()])
