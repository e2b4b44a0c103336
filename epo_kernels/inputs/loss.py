"""All arguments of a loss except its rows: unchecked as given by the caller, and as one validated record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from epo_kernels.config import EPOConfig, LossAggMode
from epo_kernels.inputs import checks
from epo_kernels.inputs.bands import as_bands
from epo_kernels.inputs.checks import InvalidTokens, Scalar, as_integer, as_scalar, check_precise
from epo_kernels.inputs.layout import Layout
from epo_kernels.inputs.tokens import TokenInputs, as_counted_tokens, as_transform


@dataclass
class LossArguments:
    """Unchecked arguments of a public loss, under their public names; see `epo_loss`.

    A loss without logits has no temperature, vocab_size, logit_softcap or logit_scale.
    """

    old_log_probs: Tensor | None
    advantages: Tensor
    mask: Tensor
    cfg: EPOConfig
    entropy_bounds: tuple[Tensor, Tensor] | None = None
    segment_ids: Tensor | None = None
    num_segments: int | None = None
    max_length: int | None = None
    penalty_weight: Scalar = 1.0
    entropy_coeff: Scalar | None = None
    kl_coeff: Scalar | None = None
    ref_log_probs: Tensor | None = None
    is_weights: Tensor | None = None
    temperature: Scalar | None = None
    normalizer: Scalar | None = None
    loss_scale: Scalar = 1.0
    vocab_size: int | None = None
    logit_softcap: float | None = None
    logit_scale: float | None = None


@dataclass(frozen=True)
class Coefficients:
    """The scheduled coefficients: floats or 0-d tensors on the device. `penalty` is smooth_coeff * penalty_weight."""

    entropy: Scalar
    penalty: Scalar
    kl: Scalar


@dataclass(frozen=True)
class Aggregation:
    """How token losses are aggregated; see `epo_kernels.aggregation`.

    Attributes:
        loss_agg_mode: as in EPOConfig.
        sequence_ids: (B, T) int64, sequence of each token of a packed batch; None if each row is one sequence.
        num_sequences: B, or the number of packed sequences.
        max_length: the constant length of "seq-mean-token-sum-norm", otherwise None.
        normalizer: replaces the number of tokens or sequences; number, 0-d tensor or None.
        loss_scale: multiplies the loss; number or 0-d tensor.
    """

    loss_agg_mode: LossAggMode
    sequence_ids: Tensor | None
    num_sequences: int
    max_length: int | None = None
    normalizer: Scalar | None = None
    loss_scale: Scalar = 1.0


@dataclass(frozen=True)
class LossInputs(TokenInputs):
    """All arguments of a loss except its rows, validated. (B, T) views; packed batches are (1, N).

    Attributes:
        cfg: the settings; the fields below take precedence.
        coefficients: the coefficients of this call.
        aggregation: how the token losses are aggregated.
        old_log_probs, advantages, ref_log_probs, is_weights: floats, or None if not given.
        lower, upper: band, (B, T) in token scope, (num_segments,) in segment scope, or None.
        segment_ids: int64, segment of each token. None if neither the band nor the ratio has segment scope, or if each
            row is one segment.
        num_segments: number of segments, 0 if unused.
    """

    cfg: EPOConfig
    coefficients: Coefficients
    aggregation: Aggregation
    old_log_probs: Tensor | None
    advantages: Tensor
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    segment_ids: Tensor | None
    num_segments: int

    def select(self, function: Callable[[Tensor], Tensor]) -> LossInputs:
        """The inputs of a subset of the tokens: applies function to every per-token argument. Not in segment scope."""
        assert self.segment_ids is None
        given = {name: value for name in _PER_TOKEN if (value := getattr(self, name)) is not None}
        changed: dict[str, Any] = {name: function(value) for name, value in given.items()}
        return dataclasses.replace(self, **changed)


_PER_TOKEN = (
    "tokens",
    "mask",
    "invalid",
    "old_log_probs",
    "advantages",
    "ref_log_probs",
    "is_weights",
    "lower",
    "upper",
)


def as_loss_inputs(layout: Layout, tokens: Tensor, arguments: LossArguments, *, width: int) -> LossInputs:
    """The validated record of a loss over logits of that width.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    cfg = arguments.cfg
    if not isinstance(cfg, EPOConfig):
        raise TypeError(f"cfg must be an EPOConfig, got {type(cfg).__name__}")
    transform = as_transform(
        layout,
        width,
        cfg.temperature if arguments.temperature is None else arguments.temperature,
        arguments.vocab_size,
        arguments.logit_softcap,
        arguments.logit_scale,
    )
    coefficients = _as_coefficients(arguments)
    aggregation = _as_aggregation(layout, arguments)
    _check_completeness(layout, arguments, coefficients)
    invalid = InvalidTokens(layout.device)
    ids, mask = as_counted_tokens(layout, tokens, arguments.mask, transform, invalid)
    num_segments = arguments.num_segments
    if num_segments is not None:
        num_segments = as_integer("num_segments", num_segments, 1)
    bands = as_bands(layout, cfg, mask, arguments.entropy_bounds, arguments.segment_ids, num_segments, invalid)
    old_log_probs, ref_log_probs, is_weights = arguments.old_log_probs, arguments.ref_log_probs, arguments.is_weights
    inputs = LossInputs(
        shape=layout.shape,
        transform=transform,
        tokens=ids,
        mask=mask,
        invalid=invalid.where,
        cfg=cfg,
        coefficients=coefficients,
        aggregation=aggregation,
        old_log_probs=None if old_log_probs is None else layout.log_probs("old_log_probs", old_log_probs),
        advantages=layout.floats("advantages", arguments.advantages, a_sequence=True),
        ref_log_probs=None if ref_log_probs is None else layout.log_probs("ref_log_probs", ref_log_probs),
        is_weights=None if is_weights is None else layout.floats("is_weights", is_weights, a_sequence=True),
        lower=bands.lower,
        upper=bands.upper,
        segment_ids=None if bands.segments is None else bands.segments.ids,
        num_segments=0 if bands.segments is None else bands.segments.number,
    )
    zero = isinstance(aggregation.normalizer, float) and aggregation.normalizer == 0
    if zero and checks.checks_values(layout.device) and bool(mask.any()):
        raise ValueError("normalizer must be > 0 where tokens count, got 0")
    return inputs


def _check_completeness(layout: Layout, arguments: LossArguments, coefficients: Coefficients) -> None:
    """Raise unless every argument required by the settings is given."""
    cfg = arguments.cfg
    if cfg.penalty != "none" and arguments.entropy_bounds is None:
        raise ValueError(
            f"entropy_bounds must be (lower, upper) if penalty is {cfg.penalty!r}, got None; take them from "
            "EntropyHistory.bounds, or use (-inf, +inf) for unknown bounds"
        )
    if arguments.ref_log_probs is None and (isinstance(coefficients.kl, Tensor) or coefficients.kl != 0):
        raise ValueError("ref_log_probs must be given unless kl_coeff is 0, got None")
    by_segment = "segment" in (cfg.band_scope, cfg.ratio_unit)
    by_sequence = (
        cfg.loss_agg_mode != "token-mean"
        or cfg.ratio_unit == "sequence"
        or (by_segment and arguments.segment_ids is None)
    )
    if layout.packed and layout.sequence_ids is None and by_sequence:
        raise ValueError(
            f"cu_seqlens must be given for packed logits with loss_agg_mode={cfg.loss_agg_mode!r}, "
            f"band_scope={cfg.band_scope!r} and policy_loss={cfg.policy_loss!r}, which depend on the sequences"
        )
    if arguments.mask is None:
        raise TypeError("mask must be a tensor, 1 at tokens that the policy generated, got None")


def _as_coefficients(arguments: LossArguments) -> Coefficients:
    """The coefficients of one call: the given ones, otherwise the config's."""
    cfg, entropy_coeff, kl_coeff = arguments.cfg, arguments.entropy_coeff, arguments.kl_coeff
    return Coefficients(
        entropy=as_scalar("entropy_coeff", cfg.entropy_coeff if entropy_coeff is None else entropy_coeff),
        penalty=as_scalar("penalty_weight", arguments.penalty_weight) * cfg.smooth_coeff,
        kl=as_scalar("kl_coeff", cfg.kl_coeff if kl_coeff is None else kl_coeff),
    )


def _as_aggregation(layout: Layout, arguments: LossArguments) -> Aggregation:
    normalizer, max_length = arguments.normalizer, None
    check_precise("normalizer", normalizer)
    mode = arguments.cfg.loss_agg_mode
    if mode == "seq-mean-token-sum-norm":
        max_length = arguments.max_length
        if max_length is None and layout.packed:
            raise ValueError(f"max_length must be given for packed logits with loss_agg_mode={mode!r}")
        max_length = max(layout.shape[1], 1) if max_length is None else as_integer("max_length", max_length, 1)
    return Aggregation(
        loss_agg_mode=mode,
        sequence_ids=layout.sequence_ids,
        num_sequences=layout.num_sequences,
        max_length=max_length,
        normalizer=None if normalizer is None else as_scalar("normalizer", normalizer, low=0.0),
        loss_scale=as_scalar("loss_scale", arguments.loss_scale),
    )
