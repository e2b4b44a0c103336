"""The tokens to score, and the transform of their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epo_kernels.config import FLOAT32_LARGEST, FLOAT32_SMALLEST
from epo_kernels.inputs import checks
from epo_kernels.inputs.checks import InvalidTokens, Scalar, as_integer, as_scalar
from epo_kernels.inputs.layout import Layout


@dataclass(frozen=True)
class LogitTransform:
    """How raw logits x become z, over [0, vocab_size): softcap tanh(scale x / softcap) / temperature.

    Attributes:
        vocab_size: number of real vocabulary entries in a row; the rest is padding of the head.
        temperature: number, 0-d tensor, or (B, T).
        softcap: Gemma's final logit soft-capping, or None.
        scale: logit multiplier, as in Cohere and Granite, or None.
    """

    vocab_size: int
    temperature: Scalar
    softcap: float | None
    scale: float | None


@dataclass(frozen=True)
class TokenInputs:
    """The tokens to score, as (B, T) views; packed batches are (1, N).

    Attributes:
        shape: the caller's shape of `tokens`, also the shape of results.
        transform: how raw logits become z.
        tokens: int64.
        mask: bool. No other argument may be read where it is False.
        invalid: bool, True where another argument of a counted token is inconsistent, which makes its log-prob NaN;
            None if no token is invalid.
    """

    shape: torch.Size
    transform: LogitTransform
    tokens: Tensor
    mask: Tensor
    invalid: Tensor | None


def as_transform(
    layout: Layout,
    width: int,
    temperature: Scalar,
    vocab_size: int | None,
    logit_softcap: float | None,
    logit_scale: float | None,
) -> LogitTransform:
    """The transform of logits of that width; the other arguments are as in `epo_loss`.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    if width < 1:
        raise ValueError("weight must have at least one row, got none")
    if vocab_size is None:
        vocab_size = width
    vocab_size = as_integer("vocab_size", vocab_size, 1, width, " (the logits' width)")
    for name, value, low in (("logit_softcap", logit_softcap, 0.0), ("logit_scale", logit_scale, -math.inf)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number or None, got a tensor")
        if value is not None:
            as_scalar(name, value, low, open_low=True)
            if not FLOAT32_SMALLEST <= abs(value) <= FLOAT32_LARGEST:
                limits = f"{FLOAT32_SMALLEST:.3g} and {FLOAT32_LARGEST:.3g}"
                raise ValueError(f"{name} must be None, or have a magnitude between {limits}, got {value}")
    if logit_softcap is not None and abs(logit_scale or 1.0) / logit_softcap > FLOAT32_LARGEST:
        raise ValueError(f"logit_softcap must be large enough to divide logit_scale, got {logit_softcap}")
    transform = LogitTransform(vocab_size, temperature, logit_softcap, logit_scale)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return replace(transform, temperature=layout.floats("temperature", temperature, a_sequence=True))
    temperature = as_scalar("temperature", temperature, low=0.0, open_low=True)
    if not isinstance(temperature, Tensor) and not torch.compiler.is_compiling():
        lowest = _lowest_temperature(transform)
        if not lowest <= temperature <= FLOAT32_LARGEST:
            raise ValueError(f"temperature must be between {lowest:.3g} and {FLOAT32_LARGEST:.3g}, got {temperature}")
    return replace(transform, temperature=temperature)


def _lowest_temperature(transform: LogitTransform) -> float:
    """The lowest temperature by which float32 can divide everything in the transform."""
    return FLOAT32_SMALLEST * max(1.0, abs(transform.scale or 1.0), transform.softcap or 1.0)


def as_token_inputs(layout: Layout, tokens: Tensor, mask: Tensor | None, transform: LogitTransform) -> TokenInputs:
    """Tokens and mask as (B, T) int64 and bool; mask None counts every token.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    invalid = InvalidTokens(layout.device)
    ids, counted = as_counted_tokens(layout, tokens, mask, transform, invalid)
    return TokenInputs(layout.shape, transform, ids, counted, invalid.where)


def as_counted_tokens(
    layout: Layout, tokens: Tensor, mask: Tensor | None, transform: LogitTransform, invalid: InvalidTokens
) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of `as_token_inputs`; adds to the invalid tokens."""
    tokens = layout.per_token("tokens", tokens).to(torch.int64)
    counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else as_mask(layout, mask, invalid)
    temperature = transform.temperature
    if isinstance(temperature, Tensor):
        sound = (temperature >= _lowest_temperature(transform)) & (temperature <= FLOAT32_LARGEST)
        advice = "temperature must be > 0, finite, and large enough for float32 to divide by where the mask is 1"
        invalid.reject(counted & ~sound, temperature.expand(counted.shape), advice)
    if checks.checks_values(layout.device):  # otherwise the kernels check
        outside = counted & ((tokens < 0) | (tokens >= transform.vocab_size))
        advice = "tokens must be in [0, {limit}) where the mask is 1 (mask out padding and -100 labels)"
        invalid.reject(outside, tokens, advice, limit=transform.vocab_size)
    return tokens, counted


def as_mask(layout: Layout, mask: Tensor, invalid: InvalidTokens) -> Tensor:
    """The mask as (B, T) bool. Marks tokens as invalid: all of them if cu_seqlens is invalid."""
    mask = layout.per_token("mask", mask)
    counted = mask if mask.dtype == torch.bool else mask != 0
    if mask.dtype != torch.bool:
        invalid.reject(counted & (mask != 1), mask, "mask must be bool, or contain only 0 and 1")
    if layout.in_order is not None:
        invalid.mark(counted & ~layout.in_order)
    return counted
