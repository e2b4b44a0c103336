"""The part of a fused backend that is independent of its kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import cast, get_args

import torch
from torch import Tensor

from epo_kernels import reference
from epo_kernels.aggregation import sequence_lengths, token_weights
from epo_kernels.autograd import refuse_transforms
from epo_kernels.config import EPOConfig
from epo_kernels.declaration import COEFFICIENTS, RowPolicyLoss
from epo_kernels.fused import linear, linear_ops, ops
from epo_kernels.fused.head import UnmaskedTokens
from epo_kernels.fused.rows import Prepared, RowKernels, RowLoss, Rows, StatisticsKernels, Terms
from epo_kernels.fused.sharded import ShardedRows
from epo_kernels.inputs import Aggregation, Chunking, LossInputs, Projection, Scalar, TokenInputs, tracing
from epo_kernels.metrics import LossMetrics
from epo_kernels.shard import Shard


class FusedBackend:
    """A backend built from row kernels.

    Args:
        name: as in `available_backends`.
        device_types: torch device types that the kernels run on.
        load: creates the kernels; called once, on first use.
        why_unavailable: returns None if the kernels can run on this machine, otherwise the reason and the fix.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(
        self,
        name: str,
        device_types: tuple[str, ...],
        load: Callable[[], RowKernels],
        why_unavailable: Callable[[], str | None],
    ) -> None:
        self.name = name
        self._device_types = device_types
        self._load = load
        self._shard: Shard | None = None
        # Called by Dynamo rather than traced: it probes the machine in ways that Dynamo cannot follow.
        self._why_unavailable = torch.compiler.assume_constant_result(why_unavailable)
        ops.KERNELS[name] = lambda: self.kernels

    @cached_property
    def kernels(self) -> RowKernels:
        return self._load()

    def sharded(self, shard: Shard) -> FusedBackend:
        """The same backend for a rank's part of the vocabulary."""
        backend = copy.copy(self)
        backend._shard = shard
        return backend

    @property
    def device_types(self) -> tuple[str, ...]:
        return self._device_types

    def why_unavailable(self) -> str | None:
        return self._why_unavailable()

    def epo_loss(self, logits: Tensor, inputs: LossInputs, *, inplace: bool) -> reference.EPOOutput:
        refuse_transforms(logits)
        if tracing() or self._shard is not None or needs_two_passes(inputs) or logits.dtype == torch.float16:
            # A segment band or a sequence ratio needs statistics of other tokens before any gradient: first the
            # statistics, then the per-token maths, then the gradient.
            # Compiled graphs take the same path, because it leaves nothing to multiply in backward. So does float16,
            # whose range holds the gradient only after it is multiplied by the upstream gradient (a GradScaler's
            # scale), and so does a split vocabulary, whose gradient needs the statistics of all ranks.
            log_probs, entropy = self._statistics(logits, inputs, entropy=True, inplace=inplace)
            assert entropy is not None
            return reference.loss_of_statistics(log_probs, entropy, inputs)
        rows, prepared = Rows.of(logits, inputs), self._prepare(inputs)
        terms = terms_of(_for_rows(inputs), prepared)
        result = ops.fused_loss(self.kernels, rows, terms, inplace=inplace)
        return _output(result, prepared, inputs)

    def log_probs_and_entropy(
        self, logits: Tensor, inputs: TokenInputs, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        refuse_transforms(logits)
        return self._statistics(logits, inputs, entropy=entropy, inplace=False)

    def distribution_statistics(self, logits: Tensor, inputs: TokenInputs) -> reference.DistributionStatistics:
        refuse_transforms(logits)
        return linear.distribution_of_rows(self._row_statistics, Rows.of(logits, inputs))

    def linear_distribution_statistics(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking
    ) -> reference.DistributionStatistics:
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        return linear.linear_distribution_statistics(self._row_statistics, projection, inputs, chunking)

    def linear_epo_loss(self, projection: Projection, inputs: LossInputs, chunking: Chunking) -> reference.EPOOutput:
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        if tracing() or needs_two_passes(inputs):
            log_probs, entropy = self.linear_log_probs_and_entropy(projection, inputs, chunking, entropy=True)
            assert entropy is not None
            out = reference.loss_of_statistics(log_probs, entropy, inputs)
            if not out.loss.requires_grad:  # nothing will be recomputed
                return out
            return out._replace(metrics=out.metrics.replace(recomputed_tokens=out.metrics.tokens))
        prepared = self._prepare(inputs)
        own = _for_rows(inputs)
        scaled = projection.product_dtype == torch.float16 and any(linear.wanted_gradients(projection))

        def loss_of(unmasked: UnmaskedTokens) -> linear.ChunkLoss:
            if scaled or self._shard is not None:
                return linear.ChunkLossOfStatistics(
                    self._row_statistics, own.select(unmasked.take_row), unmasked.take_row(prepared.weights)
                )
            return linear.FusedChunkLoss(self.kernels, terms_of(own, prepared).map(unmasked.take_row))

        result = linear.linear_loss(self._row_statistics, projection, inputs, chunking, loss_of)
        return _output(result, prepared, inputs)

    def linear_log_probs_and_entropy(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        if tracing():
            return linear_ops.traced_linear_statistics(self.name, projection, inputs, chunking, entropy=entropy)
        return linear.linear_log_probs_and_entropy(self._row_statistics, projection, inputs, chunking, entropy=entropy)

    @property
    def _row_statistics(self) -> StatisticsKernels:
        """Statistics and gradients of whole rows, even if this rank has only part of the columns."""
        return self.kernels if self._shard is None else ShardedRows(self.kernels, self._shard)

    def _prepare(self, inputs: LossInputs) -> Prepared:
        return self.kernels.prepare(inputs.mask, inputs.aggregation, coefficients_of(inputs))

    def _statistics(
        self, logits: Tensor, inputs: TokenInputs, *, entropy: bool, inplace: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = Rows.of(logits, inputs)
        if tracing():  # the traced operators are functional, so inplace is ignored
            return ops.traced_statistics(self.name, rows, entropy=entropy)
        return ops.fused_statistics(self._row_statistics, rows, entropy=entropy, inplace=inplace)


def needs_two_passes(inputs: LossInputs) -> bool:
    """Whether the gradient needs statistics of other rows, or the loss has a term unknown to row kernels."""
    cfg = inputs.cfg
    segment_band = cfg.band_scope == "segment" and cfg.penalty != "none" and inputs.lower is not None
    return segment_band or row_policy_loss(cfg) is None or cfg.kl_bias_correction


def row_policy_loss(cfg: EPOConfig) -> RowPolicyLoss | None:
    """The row kernels' name of the policy loss; None if a token's loss depends on other tokens."""
    if not cfg.is_per_token:
        return None
    name = f"dppo_{cfg.dppo_divergence}" if cfg.policy_loss == "dppo" else cfg.policy_loss
    return cast(RowPolicyLoss, name) if name in get_args(RowPolicyLoss) else None


def _for_rows(inputs: LossInputs) -> LossInputs:
    """The inputs of a token-scope loss. A segment band without a penalty only marks the tokens where it is invalid;
    `_output` counts the tokens outside.
    """
    if inputs.cfg.band_scope == "token":
        return inputs
    lower = upper = None
    if inputs.lower is not None:
        assert inputs.upper is not None
        segments = reference.Groups(inputs.mask, inputs.segment_ids, inputs.num_segments)
        invalid = segments.spread(inputs.lower.isnan() | inputs.upper.isnan())
        lower = torch.full_like(inputs.advantages, -math.inf).masked_fill(invalid, math.nan)
        upper = torch.full_like(inputs.advantages, math.inf)
    cfg = replace(inputs.cfg, band_scope="token")
    return replace(inputs, cfg=cfg, lower=lower, upper=upper, segment_ids=None, num_segments=0)


def _output(result: RowLoss, prepared: Prepared, inputs: LossInputs) -> reference.EPOOutput:
    sums, extras = result.sums, prepared.extras
    metrics = LossMetrics(torch.cat([sums, extras]))
    if inputs.cfg.band_scope == "segment" and inputs.lower is not None:  # a band without a penalty is only counted
        band = reference.band_of_tokens(result.entropy, inputs)
        below, above = ((side & inputs.mask).sum() for side in (band.below, band.above))
        metrics = metrics.replace(below_band_tokens=below, above_band_tokens=above)
    return reference.EPOOutput(
        result.loss, metrics, result.log_probs.reshape(inputs.shape), result.entropy.reshape(inputs.shape)
    )


def coefficients_of(inputs: LossInputs) -> tuple[Scalar, ...]:
    """The values of COEFFICIENTS, in order."""
    cfg, coefficients = inputs.cfg, inputs.coefficients
    of_call: dict[str, Scalar] = {
        "clip_ratio_c": math.inf if cfg.clip_ratio_c is None else cfg.clip_ratio_c,
        "entropy_coeff": coefficients.entropy,
        "penalty_coeff": coefficients.penalty,
        "kl_coeff": coefficients.kl,
    }
    return tuple(of_call[name] if name in of_call else getattr(cfg, name) for name in COEFFICIENTS)


def terms_of(inputs: LossInputs, prepared: Prepared) -> Terms:
    """The arguments of a loss launch, from inputs in token scope."""
    policy_loss = row_policy_loss(inputs.cfg)
    assert policy_loss is not None
    return Terms(
        weights=prepared.weights,
        advantages=inputs.advantages,
        old_log_probs=inputs.old_log_probs,
        ref_log_probs=inputs.ref_log_probs,
        is_weights=inputs.is_weights,
        lower=inputs.lower,
        upper=inputs.upper,
        coefficients=prepared.coefficients,
        ticket=prepared.ticket,
        policy_loss=policy_loss,
        penalty=inputs.cfg.penalty,
        kl_type=inputs.cfg.kl_type,
    )


class PlainHelpers:
    """`prepare` and `scale` of `RowKernels` in plain PyTorch."""

    def prepare(self, mask: Tensor, aggregation: Aggregation, coefficients: tuple[Scalar, ...]) -> Prepared:
        lengths = sequence_lengths(mask, aggregation.sequence_ids, aggregation.num_sequences)
        weights = token_weights(mask, aggregation, lengths).contiguous()
        extras = weights.new_zeros(2, dtype=torch.float64)
        extras[0] = (lengths > 0).sum()
        return Prepared(
            weights,
            torch.stack([torch.as_tensor(value, dtype=torch.float32, device=mask.device) for value in coefficients]),
            mask.new_zeros(1, dtype=torch.int32),
            extras,
        )

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        """Reads the factor: free on the CPU, a sync on other devices."""
        value = factor.item()
        if out is not gradient or value != 1.0:
            torch.mul(gradient, value, out=out)
