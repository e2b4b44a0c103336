"""Random inputs of a case: never zeros, and several sets, so that no cache contains the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case

SPREAD = 3.0  # standard deviation of the logits: rows have entropies of about log V - SPREAD² / 2 nats


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call. (B, T) unless said otherwise; floats are float32.

    Attributes:
        logits: (B, T, V), None in linear tasks. A leaf that requires a gradient if the task has one.
        hidden, weight: (B, T, D) and (V, D), None in other tasks; leaves in the same way.
        tokens, mask: int64, bool.
        old_log_probs, ref_log_probs: near the true ones, so that some ratios are clipped and others are not.
        advantages: (B,).
        lower, upper: band bounds, each with true entropies on both sides.
        turns: segment of each token (a turn of a sequence), int64.
        upstream: gradients of log-prob and entropy, for tasks without a loss.
    """

    logits: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    tokens: Tensor
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    lower: Tensor
    upper: Tensor
    turns: Tensor
    upstream: tuple[Tensor, Tensor]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The inputs of a call: (logits,), or (hidden, weight)."""
        return tuple(value for value in (self.logits, self.hidden, self.weight) if value is not None)

    @property
    def width(self) -> int:
        """V."""
        return self.rows[0].shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiated tensors, by the name of their gradient among an implementation's outputs."""
        named = {"grad_logits": self.logits, "grad_hidden": self.hidden, "grad_weight": self.weight}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    @property
    def device(self) -> torch.device:
        return self.tokens.device


def make_inputs(case: Case, device: torch.device, seed: int, weight: Tensor | None = None) -> Inputs:
    """A new set. weight: shared with another set, because a head is large and does not change from call to call."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = case.shape, case.torch_dtype

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale)

    tokens = torch.randint(case.vocab_size, shape, generator=generator, device=device)
    logits = hidden = None
    if case.linear:
        hidden = normal(*shape, case.hidden_size).to(dtype)
        if weight is None:
            weight = normal(case.vocab_size, case.hidden_size, scale=SPREAD / math.sqrt(case.hidden_size)).to(dtype)
            weight.requires_grad_(case.gradient)
        sampled = (hidden.float() * weight.detach()[tokens].float()).sum(dim=-1)
        hidden.requires_grad_(case.gradient)
    else:
        logits = normal(*shape, case.vocab_size, scale=SPREAD).to(dtype)
        sampled = logits.gather(-1, tokens[..., None])[..., 0].float()
        logits.requires_grad_(case.gradient)
    # For normally distributed logits, log Σ e^z is about log V + SPREAD² / 2, and the entropy log V - SPREAD² / 2.
    log_probs = sampled - (math.log(case.vocab_size) + SPREAD**2 / 2)
    entropy = math.log(case.vocab_size) - SPREAD**2 / 2
    middle = entropy + normal(*shape, scale=0.1)
    width = 0.02 + 0.1 * torch.rand(*shape, generator=generator, device=device)
    position = torch.arange(shape[1], device=device).expand(shape)
    turn, place = position // case.turn_length, position % case.turn_length
    sequence = torch.arange(shape[0], device=device)[:, None]
    return Inputs(
        logits=logits,
        hidden=hidden,
        weight=weight,
        tokens=tokens,
        mask=place >= case.turn_length - case.counted_a_turn,
        old_log_probs=log_probs + normal(*shape, scale=0.3),
        ref_log_probs=log_probs + normal(*shape, scale=0.3),
        advantages=normal(shape[0]),
        lower=middle - width,
        upper=middle + width,
        turns=sequence * (shape[1] // case.turn_length) + turn,
        upstream=(normal(*shape), normal(*shape)),
    )
