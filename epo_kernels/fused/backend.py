"""What every fused backend has in common: everything but its kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import cast, get_args

import torch
from torch import Tensor

from epo_kernels import reference
from epo_kernels.aggregation import sequence_lengths, token_weights
from epo_kernels.autograd import refuse_transforms
from epo_kernels.config import EPOConfig
from epo_kernels.declaration import COEFFICIENTS, RowPolicyLoss
from epo_kernels.fused import linear, linear_ops, ops
from epo_kernels.fused.rows import Prepared, RowKernels, RowLoss, Rows, Terms, Weighing
from epo_kernels.fused.sharded import Shard, ShardedRows
from epo_kernels.inputs import Coefficients, LogitTransform, Projection, Scalar, TokenInputs, tracing
from epo_kernels.metrics import LossMetrics


class FusedBackend:
    """A backend made of row kernels.

    Args:
        name: as in `available_backends`.
        device_types: torch device types that the kernels compute on.
        load: makes the kernels; called once, at first use.
        why_unavailable: None where they can run on this machine, else why not and what would cure it.
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
        # Dynamo calls it, and doesn't trace it: what a machine has is found out in ways that it can't follow.
        self._why_unavailable = torch.compiler.assume_constant_result(why_unavailable)
        ops.KERNELS[name] = lambda: self.kernels

    @cached_property
    def kernels(self) -> RowKernels:
        return self._load()

    def sharded(self, shard: Shard) -> FusedBackend:
        """The same over a rank's part of the vocabulary."""
        backend = copy.copy(self)
        backend.kernels = ShardedRows(self.kernels, shard)
        return backend

    @property
    def device_types(self) -> tuple[str, ...]:
        return self._device_types

    def why_unavailable(self) -> str | None:
        return self._why_unavailable()

    def epo_loss(
        self,
        logits: Tensor,
        transform: LogitTransform,
        inputs: TokenInputs,
        coefficients: Coefficients,
        cfg: EPOConfig,
        *,
        inplace: bool,
    ) -> reference.EPOOutput:
        refuse_transforms(logits)
        rows = Rows(logits, inputs.tokens, inputs.mask, transform)
        if tracing() or needs_two_passes(inputs, cfg) or logits.dtype == torch.float16:
            # A band or a policy loss may need statistics of a segment before any gradient: statistics, the maths per
            # token, then the gradient.
            # Compiled graphs go the same way, because it leaves nothing to multiply in backward. So does float16, which
            # is only wide enough for the gradient once it is multiplied by its upstream, a GradScaler's scale.
            log_probs, entropy = self._statistics(rows, entropy=True, inplace=inplace)
            assert entropy is not None
            return reference.loss_of_statistics(log_probs, entropy, transform.vocab_size, inputs, coefficients, cfg)
        prepared = self._prepare(inputs, coefficients, cfg)
        result = ops.fused_loss(self.kernels, rows, terms_of(inputs, prepared, cfg), inplace=inplace)
        return _output(result, prepared, inputs, cfg)

    def log_probs_and_entropy(
        self, logits: Tensor, transform: LogitTransform, tokens: Tensor, mask: Tensor, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        refuse_transforms(logits)
        return self._statistics(Rows(logits, tokens, mask, transform), entropy=entropy, inplace=False)

    def linear_epo_loss(
        self,
        projection: Projection,
        transform: LogitTransform,
        inputs: TokenInputs,
        coefficients: Coefficients,
        cfg: EPOConfig,
        *,
        num_active: int | None,
        max_chunk_bytes: int,
    ) -> reference.EPOOutput:
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        if tracing() or needs_two_passes(inputs, cfg):
            log_probs, entropy = self.linear_log_probs_and_entropy(
                projection,
                transform,
                inputs.tokens,
                inputs.mask,
                entropy=True,
                num_active=num_active,
                max_chunk_bytes=max_chunk_bytes,
            )
            assert entropy is not None
            out = reference.loss_of_statistics(log_probs, entropy, transform.vocab_size, inputs, coefficients, cfg)
            if not out.loss.requires_grad:  # scored once, and that was all
                return out
            return out._replace(metrics=out.metrics.replace(recomputed_tokens=out.metrics.tokens))
        prepared = self._prepare(inputs, coefficients, cfg)
        result = linear.linear_loss(
            self.kernels,
            projection,
            transform,
            inputs.tokens,
            inputs.mask,
            terms_of(inputs, prepared, cfg),
            num_active=num_active,
            max_chunk_bytes=max_chunk_bytes,
        )
        return _output(result, prepared, inputs, cfg)

    def linear_log_probs_and_entropy(
        self,
        projection: Projection,
        transform: LogitTransform,
        tokens: Tensor,
        mask: Tensor,
        *,
        entropy: bool,
        num_active: int | None,
        max_chunk_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        statistics = (
            partial(linear_ops.traced_linear_statistics, self.name)
            if tracing()
            else partial(linear.linear_log_probs_and_entropy, self.kernels)
        )
        return statistics(
            projection,
            transform,
            tokens,
            mask,
            entropy=entropy,
            num_active=num_active,
            max_chunk_bytes=max_chunk_bytes,
        )

    def _prepare(self, inputs: TokenInputs, coefficients: Coefficients, cfg: EPOConfig) -> Prepared:
        weighing = weighing_of(inputs, coefficients, cfg)
        return self.kernels.prepare(inputs.mask, weighing, coefficients_of(coefficients, cfg))

    def _statistics(self, rows: Rows, *, entropy: bool, inplace: bool) -> tuple[Tensor, Tensor | None]:
        if tracing():  # functional: a permission to overwrite goes unused
            return ops.traced_statistics(self.name, rows, entropy=entropy)
        return ops.fused_statistics(self.kernels, rows, entropy=entropy, inplace=inplace)


def needs_two_passes(inputs: TokenInputs, cfg: EPOConfig) -> bool:
    """Whether the gradient needs statistics of other rows, or the loss has a term that row kernels do not know."""
    segment_band = cfg.band_scope == "segment" and cfg.penalty != "none" and inputs.lower is not None
    return segment_band or row_policy_loss(cfg) is None or cfg.kl_bias_correction


def row_policy_loss(cfg: EPOConfig) -> RowPolicyLoss | None:
    """The policy loss by the name that row kernels know it under; None where a token's depends on other tokens."""
    if not cfg.is_per_token:
        return None
    name = f"dppo_{cfg.dppo_divergence}" if cfg.policy_loss == "dppo" else cfg.policy_loss
    return cast(RowPolicyLoss, name) if name in get_args(RowPolicyLoss) else None


def _output(result: RowLoss, prepared: Prepared, inputs: TokenInputs, cfg: EPOConfig) -> reference.EPOOutput:
    sums, extras = result.sums, prepared.extras
    metrics, loss = LossMetrics(torch.cat([sums, extras])), result.loss
    if cfg.band_scope == "segment" and inputs.lower is not None:  # a band without a penalty is only looked at
        band = reference.band_of_tokens(result.entropy, inputs, cfg)
        below, above, invalid = ((side & inputs.mask).sum() for side in (band.below, band.above, band.invalid))
        doubt = torch.where(invalid > 0, float("nan"), 1.0).to(loss.dtype)  # a factor, so that gradients become NaN too
        loss = loss * doubt
        metrics = metrics.replace(
            below_band_tokens=below,
            above_band_tokens=above,
            invalid_tokens=metrics.invalid_tokens + invalid,
            loss=metrics.loss * doubt,
        )
    return reference.EPOOutput(
        loss, metrics, result.log_probs.reshape(inputs.shape), result.entropy.reshape(inputs.shape)
    )


def coefficients_of(coefficients: Coefficients, cfg: EPOConfig) -> tuple[Scalar, ...]:
    """The values of COEFFICIENTS, in that order."""
    of_call: dict[str, Scalar] = {
        "clip_ratio_c": math.inf if cfg.clip_ratio_c is None else cfg.clip_ratio_c,
        "entropy_coeff": coefficients.entropy,
        "penalty_coeff": coefficients.penalty,
        "kl_coeff": coefficients.kl,
    }
    return tuple(of_call[name] if name in of_call else getattr(cfg, name) for name in COEFFICIENTS)


def weighing_of(inputs: TokenInputs, coefficients: Coefficients, cfg: EPOConfig) -> Weighing:
    return Weighing(
        cfg.loss_agg_mode,
        inputs.sequence_ids,
        inputs.num_sequences,
        inputs.max_length,
        coefficients.normalizer,
        coefficients.loss_scale,
    )


def terms_of(inputs: TokenInputs, prepared: Prepared, cfg: EPOConfig) -> Terms:
    by_token = cfg.band_scope == "token"
    policy_loss = row_policy_loss(cfg)
    assert policy_loss is not None
    return Terms(
        weights=prepared.weights,
        advantages=inputs.advantages,
        old_log_probs=inputs.old_log_probs,
        ref_log_probs=inputs.ref_log_probs,
        is_weights=inputs.is_weights,
        lower=inputs.lower if by_token else None,
        upper=inputs.upper if by_token else None,
        coefficients=prepared.coefficients,
        ticket=prepared.ticket,
        policy_loss=policy_loss,
        penalty=cfg.penalty,
        kl_type=cfg.kl_type,
    )


class PlainHelpers:
    """The two small operations of `RowKernels` in plain PyTorch."""

    def prepare(self, mask: Tensor, weighing: Weighing, coefficients: tuple[Scalar, ...]) -> Prepared:
        lengths = sequence_lengths(mask, weighing.sequence_ids, weighing.num_sequences)
        weights = token_weights(
            mask,
            weighing.loss_agg_mode,
            lengths=lengths,
            sequence_ids=weighing.sequence_ids,
            max_length=weighing.max_length,
            normalizer=weighing.normalizer,
            loss_scale=weighing.loss_scale,
        ).contiguous()
        extras = weights.new_zeros(2, dtype=torch.float64)
        extras[0] = (lengths > 0).sum()
        return Prepared(
            weights,
            torch.stack([torch.as_tensor(value, dtype=torch.float32, device=mask.device) for value in coefficients]),
            mask.new_zeros(1, dtype=torch.int32),
            extras,
        )

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        """Reads the factor: free on the CPU, a sync elsewhere."""
        value = factor.item()
        if value != 1.0:
            gradient.mul_(value)
