"""From hidden states to loss without materialising the logits: chunks of tokens through products and row kernels.

Masked tokens are dropped before the first product. The N counted tokens are processed in chunks:

    token scope             logits → loss, overwritten by ∂logits → ∂hidden, ∂weight       6 N D V operations
    log_probs_and_entropy   logits → both; in backward logits → ∂logits → both products    8 N D V
    segment scope           the same, with the loss in between                             8 N D V
    without gradient        logits → loss or statistics                                    2 N D V

Live at a time: one chunk, ∂weight (of several chunks in float32, see `HeadGradients`), and for float16 hidden states
∂hidden in float32. Each fused backend provides its own row kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from epo_kernels import reference
from epo_kernels.autograd import differentiable_once
from epo_kernels.declaration import ROW_SUMS
from epo_kernels.fused.head import Head, HeadGradients, Needs, UnmaskedTokens, unmasked_tokens
from epo_kernels.fused.rows import (
    RowKernels,
    RowLoss,
    Rows,
    RowStatistics,
    StatisticsKernels,
    Terms,
    kernel_tokens,
)
from epo_kernels.inputs import Chunking, LogitTransform, LossInputs, Projection, TokenInputs

MakeHead = Callable[[Tensor, Tensor, Tensor | None], Head]
RowsOf = Callable[[slice, Tensor], Rows]


class ChunkLoss(Protocol):
    """The token-scope loss of one chunk of unmasked tokens."""

    def __call__(self, part: slice, hidden: Tensor, rows: Rows, gradients: HeadGradients | None) -> RowLoss:
        """The loss of rows (1, c). If gradients are needed, adds them and overwrites the rows' logits."""


@dataclass(frozen=True)
class FusedChunkLoss:
    """Loss and ∂logits in one launch. terms: (1, n)."""

    kernels: RowKernels
    terms: Terms

    def __call__(self, part: slice, hidden: Tensor, rows: Rows, gradients: HeadGradients | None) -> RowLoss:
        terms = self.terms.map(lambda values: values[:, part])
        if gradients is None:
            return self.kernels.loss(rows, terms, None)
        result = self.kernels.loss(rows, terms, rows.logits)
        gradients.add(part, hidden, rows.logits[0])
        return result


@dataclass(frozen=True)
class ChunkLossOfStatistics:
    """Statistics, then the reference's loss of them, then ∂logits.

    For rows split over ranks, and for float16 products, whose ∂logits are multiplied by a scale that depends on the
    derivatives of all tokens of the chunk.

    Attributes:
        inputs, weights: of the unmasked tokens, (1, n).
    """

    kernels: StatisticsKernels
    inputs: LossInputs
    weights: Tensor

    def __call__(self, part: slice, hidden: Tensor, rows: Rows, gradients: HeadGradients | None) -> RowLoss:
        statistics = self.kernels.statistics(rows, entropy=True)
        inputs = self.inputs.select(lambda values: values[:, part])
        result, grad_log_probs, grad_entropy = loss_of_statistics(statistics, inputs, self.weights[:, part])
        if gradients is not None:
            gradients.add_rows(part, hidden, rows, statistics, grad_log_probs, grad_entropy)
        return result


def loss_of_statistics(
    statistics: RowStatistics, inputs: LossInputs, weights: Tensor
) -> tuple[RowLoss, Tensor, Tensor]:
    """`RowKernels.loss` from given statistics, and its derivatives (B, T) by log-prob and entropy. No sync."""
    assert statistics.entropy is not None
    with torch.enable_grad():
        log_probs, entropy = (value.detach().requires_grad_() for value in (statistics.log_probs, statistics.entropy))
        losses = reference.token_losses(log_probs, entropy, inputs)
        total = torch.where(inputs.mask, losses.total, 0.0).mul(weights).sum()
    d_log_probs, d_entropy = torch.autograd.grad(total, (log_probs, entropy), materialize_grads=True)
    sums = reference.row_sums(statistics.log_probs, statistics.entropy, weights, losses, inputs)
    packed = torch.stack([sums[name] for name in ROW_SUMS])
    loss = sums["loss"].to(weights.dtype)
    return RowLoss(statistics.log_probs, statistics.entropy, packed, loss), d_log_probs, d_entropy


def row_maker(transform: LogitTransform, tokens: Tensor, unmasked: UnmaskedTokens) -> RowsOf:
    """A function from a chunk's logits (c, V) and its slice of the unmasked tokens to rows. tokens: see `Rows`."""
    chosen = unmasked.take_row(tokens)
    counted = torch.ones_like(chosen, dtype=torch.bool)
    temperature = transform.temperature
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return lambda part, logits: Rows(logits[None], chosen[:, part], counted[:, part], transform)
    temperatures = unmasked.take_row(temperature)
    return lambda part, logits: Rows(
        logits[None], chosen[:, part], counted[:, part], replace(transform, temperature=temperatures[:, part])
    )


def statistics_of_head(kernels: StatisticsKernels, head: Head, rows_of: RowsOf, *, entropy: bool) -> RowStatistics:
    """Statistics of the unmasked tokens, each (1, n) float32, from one pass of products."""
    chunks = [kernels.statistics(rows_of(part, logits), entropy=entropy) for part, _, logits in head.chunks()]
    if not chunks:
        nothing = torch.zeros(1, 0, dtype=torch.float32, device=head.hidden.device)
        return RowStatistics(nothing, nothing if entropy else None, nothing, nothing)
    log_probs, entropies, maximum, total = zip(*chunks, strict=True)
    return RowStatistics(
        torch.cat(log_probs, dim=1),
        torch.cat(entropies, dim=1) if entropy else None,
        torch.cat(maximum, dim=1),
        torch.cat(total, dim=1),
    )


def gradients_of_head(
    kernels: StatisticsKernels,
    head: Head,
    rows_of: RowsOf,
    statistics: RowStatistics,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    needs: Needs,
) -> HeadGradients:
    """Gradients for upstream gradients (1, n) of log-prob and entropy: recomputes the logits, then two products."""
    gradients = HeadGradients(head, needs, kernels)
    for part, hidden, logits in head.chunks():
        chunk = RowStatistics(
            statistics.log_probs[:, part],
            None if statistics.entropy is None else statistics.entropy[:, part],
            statistics.maximum[:, part],
            statistics.sum[:, part],
        )
        grad_entropies = None if grad_entropy is None else grad_entropy[:, part]
        gradients.add_rows(part, hidden, rows_of(part, logits), chunk, grad_log_probs[:, part], grad_entropies)
    gradients.complete()
    return gradients


class LinearStatistics(torch.autograd.Function):
    """hidden, weight, bias -> log_probs, entropy of the unmasked tokens, (1, n). Backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, kernels: StatisticsKernels, make_head: MakeHead, rows_of: RowsOf, entropy: bool
    ):
        statistics = statistics_of_head(kernels, make_head(hidden, weight, bias), rows_of, entropy=entropy)
        ctx.save_for_backward(hidden, weight, bias, *statistics)
        ctx.call = kernels, make_head, rows_of
        ctx.set_materialize_grads(False)
        return statistics.log_probs, statistics.entropy

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, bias, *saved = ctx.saved_tensors
        statistics = RowStatistics(*saved)
        kernels, make_head, rows_of = ctx.call
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(statistics.log_probs)
        gradients = gradients_of_head(
            kernels,
            make_head(hidden, weight, bias),
            rows_of,
            statistics,
            grad_log_probs,
            grad_entropy,
            ctx.needs_input_grad[:3],
        )
        return *gradients.finish(), None, None, None, None


def linear_log_probs_and_entropy(
    kernels: StatisticsKernels, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy (B, T) of a head's logits, differentiable by hidden states, weight and bias."""
    mask = inputs.mask
    unmasked = unmasked_tokens(mask, chunking.num_active)
    log_probs, entropies = LinearStatistics.apply(
        projection.hidden,
        projection.weight,
        projection.bias,
        kernels,
        head_maker(projection, inputs.transform, unmasked, chunking),
        row_maker(inputs.transform, kernel_tokens(inputs), unmasked),
        entropy,
    )
    factor = nan_if_miscounted(mask, chunking.num_active)
    log_probs = unmasked.put(log_probs, mask.shape) * factor
    return log_probs, unmasked.put(entropies, mask.shape) * factor if entropy else None


def distribution_of_rows(kernels: StatisticsKernels, rows: Rows) -> reference.DistributionStatistics:
    """(B, T) each, in two reads of the logits."""
    statistics = kernels.statistics(rows, entropy=True)
    assert statistics.entropy is not None
    spread = kernels.spread(rows, statistics)
    # The greatest p is e^0 / s. A row wholly -inf has a sum of 0, and no probabilities.
    total = torch.where(statistics.sum > 0, statistics.sum, float("nan"))
    max_prob = torch.where(rows.mask, total.reciprocal(), 0.0)
    return reference.DistributionStatistics(statistics.entropy, spread.variance, max_prob, spread.collision)


def linear_distribution_statistics(
    kernels: StatisticsKernels, projection: Projection, inputs: TokenInputs, chunking: Chunking
) -> reference.DistributionStatistics:
    """`distribution_of_rows` of a head's logits, (B, T) each: one product, one chunk of logits alive."""
    mask = inputs.mask
    unmasked = unmasked_tokens(mask, chunking.num_active)
    make_head = head_maker(projection, inputs.transform, unmasked, chunking)
    rows_of = row_maker(inputs.transform, kernel_tokens(inputs), unmasked)
    values = torch.zeros(4, 1, len(unmasked), dtype=torch.float32, device=mask.device)
    for part, _, logits in make_head(projection.hidden, projection.weight, projection.bias).chunks():
        values[:, :, part] = torch.stack(distribution_of_rows(kernels, rows_of(part, logits)))
    factor = nan_if_miscounted(mask, chunking.num_active)
    return reference.DistributionStatistics(*(unmasked.put(value, mask.shape) * factor for value in values))


def linear_loss(
    kernels: StatisticsKernels,
    projection: Projection,
    inputs: LossInputs,
    chunking: Chunking,
    loss_of: Callable[[UnmaskedTokens], ChunkLoss],
) -> RowLoss:
    """Token-scope loss of a head's logits, differentiable once by hidden states, weight and bias.

    Args:
        loss_of: creates the loss of chunks of the unmasked tokens.
    """
    mask = inputs.mask
    unmasked = unmasked_tokens(mask, chunking.num_active)
    loss, log_probs, entropy, sums, _ = LinearLoss.apply(
        projection.hidden,
        projection.weight,
        projection.bias,
        kernels,
        head_maker(projection, inputs.transform, unmasked, chunking),
        row_maker(inputs.transform, kernel_tokens(inputs), unmasked),
        loss_of(unmasked),
        wanted_gradients(projection),
    )
    factor = nan_if_miscounted(mask, chunking.num_active)
    return RowLoss(
        unmasked.put(log_probs, mask.shape),
        unmasked.put(entropy, mask.shape),
        sums * factor,
        (loss * factor).to(loss.dtype),
    )


def wanted_gradients(projection: Projection) -> Needs:
    """Whether hidden states, weight and bias need a gradient."""
    hidden, weight, bias = (
        torch.is_grad_enabled() and value is not None and value.requires_grad
        for value in (projection.hidden, projection.weight, projection.bias)
    )
    return hidden, weight, bias


class LinearLoss(torch.autograd.Function):
    """hidden, weight, bias -> loss, then log_probs and entropy (1, n) of the unmasked tokens, and the sums.

    Gradients are computed in forward, chunk by chunk; backward multiplies them by the upstream gradient and casts them.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        kernels: StatisticsKernels,
        make_head: MakeHead,
        rows_of: RowsOf,
        chunk_loss: ChunkLoss,
        needs: Needs,
    ):
        head = make_head(hidden, weight, bias)
        gradients = HeadGradients(head, needs, kernels)
        log_probs, entropy = hidden.new_empty((2, 1, len(head.unmasked)), dtype=torch.float32)
        sums = hidden.new_zeros(len(ROW_SUMS), dtype=torch.float64)
        for part, hidden_chunk, logits in head.chunks():
            result = chunk_loss(part, hidden_chunk, rows_of(part, logits), gradients if any(needs) else None)
            log_probs[:, part], entropy[:, part] = result.log_probs, result.entropy
            sums += result.sums
        gradients.complete()
        ctx.gradients = gradients
        ctx.spent = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(log_probs, entropy, sums)
        anchor = hidden.new_empty(0)
        ctx.save_for_backward(anchor)
        return sums[ROW_SUMS.index("loss")].float(), log_probs, entropy, sums, anchor

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, *_):
        gradients, ctx.gradients, ctx.spent = ctx.gradients, None, True
        return *gradients.finish(grad_loss), None, None, None, None, None


def head_maker(
    projection: Projection, transform: LogitTransform, unmasked: UnmaskedTokens, chunking: Chunking
) -> MakeHead:
    """Everything in a head except its tensors, which autograd returns in backward."""
    return partial(
        Head,
        vocab_size=transform.vocab_size,
        product_dtype=projection.product_dtype,
        logits_dtype=projection.logits_dtype,
        unmasked=unmasked,
        max_chunk_bytes=chunking.max_chunk_bytes,
        shard=chunking.shard,
    )


def nan_if_miscounted(mask: Tensor, num_active: int | None) -> Tensor | float:
    """1, or NaN if num_active differs from the mask's count: a factor, so that gradients become NaN too. No sync."""
    if num_active is None:
        return 1.0
    return torch.where(mask.sum() == num_active, 1.0, float("nan")).float()
