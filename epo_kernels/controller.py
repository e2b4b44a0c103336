"""The entropy controller: the entropy coefficient λ, moved so that the policy's entropy meets a target."""

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
    """λ for `epo_loss(..., entropy_coeff=controller.entropy_coeff)`, by the entropy of the updates so far.

    `entropy_coeff` is one 0-d float32 tensor for the whole run, changed in place: a compiled loss is not recompiled,
    and nothing syncs. Call `update` once after each optimizer update. With H the mean token entropy of that update and
    clip to [coeff_min, coeff_max], by `rule`::

        step    c = min(c + delta, coeff_max) if H <= target else max(c - delta, coeff_min)
                λ = c if H <= target else 0, and 0 before the first update
        pi      e = target - H,  I = I + e,  λ = clip(c + kp e + ki I),  c the initial coefficient
        boxed   λ = clip(λ - lr (min(0, H - target) + max(0, H - target_high)))

    Sources:

    - "step": Skywork-OR1 (arXiv 2505.22312) as TRL implements it (`use_adaptive_entropy`; `entropy_coef_delta`,
      `entropy_coef_min`, `entropy_coef_max`, `entropy_target`), gate included.
    - "pi": EntroPIC (arXiv 2511.15248). There α = kp (H - target) + ki Σ(H - target), in [-1, 1] with kp = 1 and
      ki = 0.01, weighs positive and negative samples; here the same controller, with its sign turned, moves λ around
      its initial value. Chosen here: the sum includes the current error (the paper's code adds it afterwards), it is
      limited so that c + ki I stays within the bounds (the code's winds up), and the default gains are smaller by 100
      and 10, because λ is a smaller number than α.
    - "boxed": AEnt (arXiv 2509.03493), with lr, the bounds and both entropies as in its code (lr 0.001,
      [1e-5, 0.01], entropies 0.1 and 0.5). Its clamped entropy, over a part of the vocabulary, is not used.

    An update without tokens, or whose entropy isn't finite, changes nothing.

    Args:
        target: entropy in nats per token; of "boxed" the lower one.
        rule: see above.
        entropy_coeff: initial coefficient, in [coeff_min, coeff_max].
        coeff_min: lower bound of the coefficient.
        coeff_max: upper bound of the coefficient.
        delta: step size of "step", >= 0.
        kp: proportional gain of "pi", >= 0.
        ki: integral gain of "pi", >= 0.
        target_high: upper entropy of "boxed", at least target; None: target.
        lr: step size of "boxed", >= 0.
        device: of `entropy_coeff`: the device of the loss.

    Attributes:
        entropy_coeff: λ, 0-d float32. Read it, never assign to it.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an argument of the wrong type.
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
        # The coefficient before its gate, the last entropy, and the sum of the errors, in float64.
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
        """Move λ by the entropy of one optimizer update. Nothing syncs where `entropy` is on the controller's device.

        Args:
            entropy: the loss's metrics, added up over micro-batches (`out.metrics`); or the entropy of each token, of
                any shape, float.
            mask: like entropy, bool or 0/1; entropies aren't read where it is 0. None: all count. Only for a tensor.
            group: the ranks whose tokens make the update together: sums and counts are all-reduced, so that λ is the
                same on all of them. Metrics that are all-reduced already give the same mean again. None: this process
                alone, with a warning where it has company.

        Raises:
            ValueError: shapes differ, or a mask beside metrics.
            TypeError: entropy is neither metrics nor a floating tensor.
        """
        sums = _sums(entropy, mask)
        if group is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            warnings.warn(
                "EntropyController.update without a group uses this rank's entropy alone, and each rank gets a "
                "coefficient of its own; pass group=torch.distributed.group.WORLD for one of all ranks",
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
        """The rule and three numbers, which `torch.load(weights_only=True)` reads. Settings are not part of it."""
        return {
            "rule": self.rule,
            "coeff": float(self._coeff),
            "entropy": float(self._entropy),
            "integral": float(self._integral),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; target, bounds and gains stay those of this controller.

        Raises:
            ValueError: the state is of another rule.
        """
        if state["rule"] != self.rule:
            raise ValueError(
                f"the saved controller has rule={state['rule']!r}, this one {self.rule!r}; build it with the saved rule"
            )
        self._coeff.fill_(state["coeff"])
        self._entropy.fill_(state["entropy"])
        self._integral.fill_(state["integral"])
        self._apply()

    def _moved(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficient (before its gate) and integral after an update of that entropy."""
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
        """Bring λ to the state, in place."""
        gate = self._entropy <= self.target if self.rule == "step" else torch.ones_like(self._coeff, dtype=torch.bool)
        self.entropy_coeff.copy_(torch.where(gate, self._coeff, 0.0))


def _number(name: str, value: float, low: float = -math.inf) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")
    return float(as_scalar(name, value, low=low))


def _sums(entropy: Tensor | LossMetrics, mask: Tensor | None) -> Tensor:
    """(2,) float64: sum and number of the entropies that count."""
    if isinstance(entropy, LossMetrics):
        if mask is not None:
            raise ValueError("mask must be None beside metrics, which know their tokens")
        return torch.stack([entropy.entropy_sum, entropy.tokens]).detach()
    if not isinstance(entropy, Tensor) or not entropy.is_floating_point():
        kind = entropy.dtype if isinstance(entropy, Tensor) else type(entropy).__name__
        raise TypeError(f"entropy must be a floating tensor or LossMetrics, got {kind}")
    counted = torch.ones_like(entropy, dtype=torch.bool)
    if mask is not None:
        if mask.shape != entropy.shape:
            raise ValueError(f"mask must have the shape of entropy {tuple(entropy.shape)}, got {tuple(mask.shape)}")
        counted = mask != 0
    values = torch.where(counted, entropy.detach().double(), 0.0)
    return torch.stack([values.sum(), counted.sum().double()])
