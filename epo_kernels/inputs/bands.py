"""The entropy band of each token or segment."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from epo_kernels.config import EPOConfig
from epo_kernels.inputs import checks
from epo_kernels.inputs.checks import InvalidTokens, check_tensor
from epo_kernels.inputs.layout import Layout


class Segments(NamedTuple):
    """The segments of a batch.

    Attributes:
        ids: (B, T) int64, in range everywhere; None if each row is one segment.
        number: number of segments.
    """

    ids: Tensor | None
    number: int


class Bands(NamedTuple):
    """The entropy band: (B, T) in token scope, (number of segments,) in segment scope, or None.

    Attributes:
        lower, upper: bounds in nats.
        segments: given if the scope of the band or of the ratio is the segment; otherwise None.
    """

    lower: Tensor | None
    upper: Tensor | None
    segments: Segments | None


def as_bands(
    layout: Layout,
    cfg: EPOConfig,
    mask: Tensor,
    entropy_bounds: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    num_segments: int | None,
    invalid: InvalidTokens,
) -> Bands:
    """The band in the form required by its scope; adds inconsistent bands to the invalid tokens.

    Args:
        mask: (B, T) bool, checked.
        entropy_bounds, segment_ids, num_segments: as in `epo_loss`; num_segments is checked.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    by_segment = False  # whether bounds are given per segment
    if entropy_bounds is not None:
        _check_pair(entropy_bounds, layout)
        shape = entropy_bounds[0].shape
        by_segment = segment_ids is not None and len(shape) == 1 and shape != layout.shape
        if by_segment and num_segments not in (None, shape[0]):
            raise ValueError(
                f"num_segments must be {shape[0]}, the length of entropy_bounds, which are given per segment; got "
                f"{num_segments}"
            )
        num_segments = shape[0] if by_segment else num_segments
    segments = None
    wants_segments = "segment" in (cfg.band_scope, cfg.ratio_unit)
    if by_segment or wants_segments:
        num_segments = mask.numel() if num_segments is None else num_segments
        segments = as_segments(layout, mask, segment_ids, num_segments, invalid)
    if entropy_bounds is None:
        return Bands(None, None, segments)
    bounded = segments if by_segment else None
    lower = _bound(layout, "entropy_bounds[0]", entropy_bounds[0], bounded)
    upper = _bound(layout, "entropy_bounds[1]", entropy_bounds[1], bounded)
    if checks.checks_values(layout.device):  # otherwise the backends check
        pairs = torch.stack([lower, upper], dim=-1)
        pairs = pairs if bounded is None else pairs[bounded.ids]
        bad = mask & ~(pairs[..., 0] <= pairs[..., 1])
        invalid.reject(bad, pairs, "entropy_bounds must be (lower, upper), lower <= upper, where the mask is 1")
    if cfg.band_scope == "token":
        if bounded is not None:
            lower, upper = lower[bounded.ids], upper[bounded.ids]
        return Bands(lower, upper, segments if wants_segments else None)
    assert segments is not None
    # NaN survives the tightening. Bands that are consistent individually may cross afterwards; both bounds then apply.
    lower = torch.where(lower <= upper, lower, math.nan)
    if bounded is None:
        lower = _tightest(lower, mask, segments, -math.inf)
        upper = _tightest(upper, mask, segments, math.inf)
    return Bands(lower, upper, segments)


def _check_pair(bounds: tuple[Tensor, Tensor], layout: Layout) -> None:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not all(isinstance(b, Tensor) for b in bounds):
        raise TypeError(f"entropy_bounds must be a pair of tensors (lower, upper), got {type(bounds).__name__}")
    if bounds[0].shape != bounds[1].shape:
        shapes = f"{tuple(bounds[0].shape)} and {tuple(bounds[1].shape)}"
        raise ValueError(f"entropy_bounds must be a pair with the same shape, got {shapes}")
    if bounds[0].numel() == 0 and layout.shape.numel() > 0:
        raise ValueError(f"entropy_bounds must hold at least one band, got shape {tuple(bounds[0].shape)}")


def _bound(layout: Layout, name: str, value: Tensor, segments: Segments | None) -> Tensor:
    """A bound per token, (B, T), or per segment."""
    if segments is None:
        return layout.floats(name, value, a_sequence=True)
    check_tensor(name, value, torch.Size([segments.number]), layout.device)
    return value.detach().to(layout.dtype)


def _tightest(bounds: Tensor, mask: Tensor, segments: Segments, unknown: float) -> Tensor:
    """(B, T) -> (number of segments,): the largest lower bound (unknown -inf), or the smallest upper one (inf)."""
    bounds = torch.where(mask, bounds, unknown)
    if segments.ids is None:
        bounds = F.pad(bounds, (0, 1), value=unknown)  # rows without tokens have no extremum
        return bounds.amax(dim=1) if unknown < 0 else bounds.amin(dim=1)
    result = torch.full((segments.number,), unknown, dtype=bounds.dtype, device=bounds.device)
    return result.scatter_reduce(0, segments.ids.reshape(-1), bounds.reshape(-1), "amax" if unknown < 0 else "amin")


def as_segments(
    layout: Layout, mask: Tensor, segment_ids: Tensor | None, num_segments: int, invalid: InvalidTokens
) -> Segments:
    """The segments of the tokens, by default their sequences; adds tokens with out-of-range segments to invalid."""
    if segment_ids is None:
        return Segments(layout.sequence_ids, layout.num_sequences)
    ids = layout.per_token("segment_ids", segment_ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segment_ids must be int64 (or int32), got {ids.dtype}")
    outside = mask & ((ids < 0) | (ids >= num_segments))
    advice = (
        "segment_ids must be in [0, {limit}) where the mask is 1: the limit is the number of segments, taken from "
        "per-segment entropy_bounds, otherwise num_segments, otherwise the number of tokens"
    )
    invalid.reject(outside, ids, advice, limit=num_segments)
    return Segments(torch.where(mask & ~outside, ids, 0).to(torch.int64), num_segments)
