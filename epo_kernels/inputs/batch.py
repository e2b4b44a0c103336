"""Per-token values given without logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epo_kernels.inputs.bands import as_segments
from epo_kernels.inputs.checks import InvalidTokens, as_integer
from epo_kernels.inputs.layout import Layout, as_layout
from epo_kernels.inputs.tokens import as_mask


@dataclass(frozen=True)
class TokenBatch:
    """Per-token values given without logits, and the segments over which their statistics are computed.

    Attributes:
        layout: shape and placement of the caller's arguments; its dtype is float64.
        mask: (B, T) bool. No other argument may be read where it is False.
        invalid: (B, T) bool, True where a mask or segment id is inconsistent but could not raise; None if no token is.
        segment_ids: (B, T) int64, in range everywhere; sequence ids if no segments were given. None for packed values
            without cu_seqlens and segments.
        num_segments: number of segments.
    """

    layout: Layout
    mask: Tensor
    invalid: Tensor | None
    segment_ids: Tensor | None
    num_segments: int

    def result(self, values: Tensor) -> Tensor:
        """(B, T) values as float32 in the caller's shape: 0 where the mask is False, NaN at invalid tokens."""
        values = torch.where(self.mask, values, 0.0).float()
        if self.invalid is not None:
            values = values.masked_fill(self.invalid, math.nan)
        return values.reshape(self.layout.shape)


def as_token_batch(
    name: str,
    values: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> TokenBatch:
    """A batch of per-token values, (B, T) or packed (N,), with its mask and segments.

    Args:
        name: the argument that defines the shape, for messages.
        values: that argument.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dim() not in (1, 2):
        raise ValueError(f"{name} must be (batch, time) or packed (tokens,), got {tuple(values.shape)}")
    layout = as_layout(values.shape, values.device, torch.float64, cu_seqlens, name)
    invalid = InvalidTokens(layout.device)
    counted = as_mask(layout, mask, invalid)
    if segment_ids is not None:
        limit = counted.numel() if num_segments is None else as_integer("num_segments", num_segments, 1)
        ids, limit = as_segments(layout, counted, segment_ids, limit, invalid)
    else:
        ids, limit = layout.sequence_ids, layout.num_sequences
        if not layout.packed:
            ids = torch.arange(limit, device=values.device)[:, None].expand(layout.shape)
    return TokenBatch(layout, counted, invalid.where, ids, limit)
