"""The correct outputs in float64, from the library's reference: the contracts and their true outputs.

Rows are processed in chunks and only where the mask is 1, so that real sizes fit: first the statistics, then the
objective's per-token derivatives, then the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

import epo_kernels as ek
from bench.cases import Case
from bench.inputs import Inputs
from epo_kernels import reference
from epo_kernels.config import Divergence
from epo_kernels.declaration import PolicyLossName
from epo_kernels.inputs import LossArguments, as_layout, as_loss_inputs

CONFIG = ek.EPOConfig(entropy_coeff=1e-2, kl_coeff=1e-2, penalty="hinge", penalty_alpha=2.0)
# Group-relative losses without entropy: no bonus, no band, no dual clip.
POLICY_CONFIG = ek.EPOConfig(entropy_coeff=0.0, kl_coeff=1e-2, clip_ratio_c=None)

# Every policy loss, and each trust region of dppo, by name: fields of EPOConfig. All other cases use "ppo".
POLICY_FIELDS: dict[str, dict[str, Any]] = {
    name: {"policy_loss": name} for name in get_args(PolicyLossName) if name != "dppo"
} | {f"dppo_{name}": {"policy_loss": "dppo", "dppo_divergence": name} for name in get_args(Divergence)}

# Larger than the change of a log-prob due to bfloat16 logits. Closer to a kink of the loss (a clip, a bound of the
# band), rounding would decide a token's gradient, and the gate would count it as a fault.
_KINK_MARGIN = 0.05

Objective = Callable[[Case, Inputs, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contract:
    """The outputs of a kind of implementation.

    Attributes:
        computes: description for the report.
        outputs: names of the required outputs, without gradients.
        objective: (case, inputs, log_probs, entropy) -> scalar whose gradient it must return; None: no gradient.
    """

    computes: str
    outputs: tuple[str, ...]
    objective: Objective | None


def config_of(case: Case, policy: str = "ppo") -> ek.EPOConfig:
    """The config of a case. policy: a key of `POLICY_FIELDS`."""
    return replace(CONFIG, band_scope=case.band_scope, **POLICY_FIELDS[policy])


def contract_of(policy: str) -> str:
    """The contract of this library's loss with that policy loss."""
    return "loss" if policy == "ppo" else f"{policy} loss"


def loss_arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Arguments of `ek.epo_loss` besides rows, tokens, old log-probs, advantages, mask and config."""
    segments = {"segment_ids": inputs.turns} if case.band_scope == "segment" else {}
    return {"entropy_bounds": (inputs.lower, inputs.upper), "ref_log_probs": inputs.ref_log_probs, **segments}


def without_last(mask: Tensor) -> Tensor:
    """The mask (B, T) without its last column, which implementations that shift the tokens themselves never count."""
    counted = mask.clone()
    counted[:, -1] = False
    return counted


def _whole_loss(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor, policy: str = "ppo") -> Tensor:
    arguments = loss_arguments(case, inputs)
    return _loss_of_statistics(inputs, inputs.mask, config_of(case, policy), arguments, log_probs, entropy)


def _policy_loss(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Tensor:
    arguments = {"ref_log_probs": inputs.ref_log_probs}
    return _loss_of_statistics(inputs, inputs.mask, POLICY_CONFIG, arguments, log_probs, entropy)


def _shifted_policy_loss(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Tensor:
    arguments = {"ref_log_probs": inputs.ref_log_probs}
    mask = without_last(inputs.mask)
    return _loss_of_statistics(inputs, mask, POLICY_CONFIG, arguments, log_probs, entropy)


def _loss_of_statistics(
    inputs: Inputs, mask: Tensor, cfg: ek.EPOConfig, arguments: dict[str, Any], log_probs: Tensor, entropy: Tensor
) -> Tensor:
    layout = as_layout(log_probs.shape, log_probs.device, log_probs.dtype, None, "log_probs")
    given = LossArguments(inputs.old_log_probs, inputs.advantages, mask, cfg, **arguments)
    checked = as_loss_inputs(layout, inputs.tokens, given, width=inputs.width)
    return reference.loss_of_statistics(log_probs, entropy, checked).loss


def _statistics(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Tensor:
    return (inputs.upstream[0] * log_probs + inputs.upstream[1] * entropy)[inputs.mask].sum()


def _log_probs(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Tensor:
    return (inputs.upstream[0] * log_probs)[inputs.mask].sum()


def _cross_entropy(case: Case, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Tensor:
    return -log_probs[inputs.mask].mean()


CONTRACTS = {
    "loss": Contract(
        "the whole loss (clip, dual clip, entropy bonus, band, KL), its gradient, log-prob and entropy",
        ("loss", "log_probs", "entropy"),
        _whole_loss,
    ),
    "policy loss": Contract("clipped loss with KL and its gradient; no entropy, no band", ("loss",), _policy_loss),
    "shifted policy loss": Contract(
        "clipped loss with KL and its gradient; no entropy, no band", ("loss",), _shifted_policy_loss
    ),
    "statistics": Contract("log-prob and entropy, both with gradient; no loss", ("log_probs", "entropy"), _statistics),
    "log-probs": Contract("log-prob with gradient; no entropy, no loss", ("log_probs",), _log_probs),
    "cross-entropy": Contract(
        "cross-entropy with gradient; no entropy, no ratio, no loss of ours", ("loss",), _cross_entropy
    ),
    "scores": Contract("log-prob and entropy, no gradient", ("log_probs", "entropy"), None),
    "log-prob scores": Contract("log-prob, no gradient; no entropy", ("log_probs",), None),
} | {
    contract_of(policy): Contract(
        f"the whole loss with policy_loss={fields['policy_loss']!r}, its gradient, log-prob and entropy",
        ("loss", "log_probs", "entropy"),
        partial(_whole_loss, policy=policy),
    )
    for policy, fields in POLICY_FIELDS.items()
    if policy != "ppo"
}


def _off_kinks(inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> Inputs:
    """Inputs whose ratios and entropies keep `_KINK_MARGIN` from the nearest clip or bound, if they matter."""

    def moved(values: Tensor, kink: float | Tensor) -> Tensor:
        gap = values - kink
        return torch.where(gap.abs() < _KINK_MARGIN, kink + _KINK_MARGIN * torch.where(gap < 0, -1.0, 1.0), values)

    log_ratios = log_probs - inputs.old_log_probs
    for kink in (1 - CONFIG.clip_ratio_low, 1 + CONFIG.clip_ratio_high, CONFIG.clip_ratio_c):
        log_ratios = log_ratios if kink is None else moved(log_ratios, math.log(kink))
    return replace(
        inputs,
        old_log_probs=(log_probs - log_ratios).float(),
        lower=moved(inputs.lower.double(), entropy).float(),
        upper=moved(inputs.upper.double(), entropy).float(),
    )


class Truth:
    """True outputs of one input set: float32 gradients, float64 statistics. Caches the last contract.

    Attributes:
        inputs: the set, with old log-probs and bounds moved away from the loss's kinks.
        log_probs, entropy: (B, T) float64, 0 where the mask is 0.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._rows = inputs.mask.flatten().nonzero()[:, 0]
        budget = (2 << 30) if inputs.device.type == "cuda" else (256 << 20)
        self._chunk = max(budget // (inputs.width * 8), 1)
        self._weight = None if inputs.weight is None else inputs.weight.detach().double()
        self.log_probs, self.entropy = self._forward()
        self.inputs = self._inputs = _off_kinks(inputs, self.log_probs, self.entropy)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def outputs(self, name: str) -> dict[str, Tensor]:
        """{output: truth} of a contract, including gradients."""
        if name != self._last[0]:
            self._last = ("", {})  # gradients are large: never keep two
            self._last = (name, self._make(CONTRACTS[name]))
        return self._last[1]

    def _make(self, contract: Contract) -> dict[str, Tensor]:
        known = {"log_probs": self.log_probs, "entropy": self.entropy}
        gradients = {}
        if contract.objective is not None:
            leaves = [value.clone().requires_grad_() for value in (self.log_probs, self.entropy)]
            known["loss"] = contract.objective(self._case, self._inputs, *leaves)
            upstream = torch.autograd.grad(known["loss"], leaves, allow_unused=True, materialize_grads=True)
            gradients = self._backward(*upstream)
        return {**{name: known[name].detach() for name in contract.outputs}, **gradients}

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices among the flat tokens, logits (c, V) in float64, tokens."""
        inputs = self._inputs
        for rows in self._rows.split(self._chunk):
            wide = inputs.rows[0].detach().flatten(0, 1)[rows].double()
            yield rows, wide if self._weight is None else wide @ self._weight.t(), inputs.tokens.flatten()[rows]

    def _forward(self) -> tuple[Tensor, Tensor]:
        shape = self._inputs.tokens.shape
        log_probs, entropy = (torch.zeros(shape, dtype=torch.float64, device=self._inputs.device) for _ in range(2))
        for rows, logits, tokens in self._chunks():
            log_probs.view(-1)[rows], entropy.view(-1)[rows] = reference.log_probs_and_entropy(logits, tokens)
        return log_probs, entropy

    def _backward(self, grad_log_probs: Tensor, grad_entropy: Tensor) -> dict[str, Tensor]:
        inputs = self._inputs
        gradients = {
            name: torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device)
            for name, leaf in inputs.leaves.items()
            if name != "grad_weight"
        }
        weight = self._weight
        total = None if weight is None else torch.zeros_like(weight)
        for rows, logits, tokens in self._chunks():
            logits.requires_grad_()
            statistics = reference.log_probs_and_entropy(logits, tokens)
            upstream = [grad.flatten()[rows] for grad in (grad_log_probs, grad_entropy)]
            (grad_logits,) = torch.autograd.grad(statistics, logits, upstream)
            if weight is None or total is None:
                gradients["grad_logits"].flatten(0, 1)[rows] = grad_logits.float()
            else:
                gradients["grad_hidden"].flatten(0, 1)[rows] = (grad_logits @ weight).float()
                total += grad_logits.t() @ inputs.rows[0].detach().flatten(0, 1)[rows].double()
        return gradients if total is None else {**gradients, "grad_weight": total.float()}
