"""Autograd around the row kernels, the same for every fused backend.

Eager: `FusedLoss` computes the gradient in forward, together with the loss; `FusedStatistics` computes it in backward
from the upstream gradients. Under `torch.compile` and with fake tensors, the statistics and their gradient are two
functional `torch.library` operators, opaque to the compiler, which traces the per-token maths between them. The
gradient of the logits then needs no further scaling.

The operators have no autocast rule on purpose: without one autocast passes them through; a rule could only copy the
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epo_kernels.autograd import TWICE, differentiable_once, refuse_transforms
from epo_kernels.fused.rows import RowKernels, RowLoss, Rows, RowStatistics, StatisticsKernels, Terms
from epo_kernels.inputs import LogitTransform


def fused_loss(kernels: RowKernels, rows: Rows, terms: Terms, *, inplace: bool) -> RowLoss:
    """The loss of the rows, differentiable once by `rows.logits`; computes a gradient only if one is needed.

    inplace: the gradient overwrites the logits. Autograd is informed: an operation that saved the logits for its own
    backward raises instead of using the overwritten values.

    Raises:
        ValueError: inplace with logits that cannot be overwritten.
    """
    if not (rows.logits.requires_grad and torch.is_grad_enabled()):
        return kernels.loss(rows, terms, None)
    if inplace:
        _check_overwritable(rows.logits)
    *result, _ = FusedLoss.apply(rows.logits, kernels, rows, terms, inplace)
    return RowLoss(*result)


def fused_statistics(
    kernels: StatisticsKernels, rows: Rows, *, entropy: bool, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy of the rows, both differentiable by `rows.logits`.

    inplace: backward overwrites the logits with their gradient and can run only once; see `fused_loss`.
    """
    if not (rows.logits.requires_grad and torch.is_grad_enabled()):
        statistics = kernels.statistics(rows, entropy=entropy)
        return statistics.log_probs, statistics.entropy
    if inplace:
        _check_overwritable(rows.logits)
    given = rows.transform.temperature
    temperature = given if isinstance(given, Tensor) else None
    return FusedStatistics.apply(
        rows.logits, rows.tokens, rows.mask, temperature, rows.transform, kernels, entropy, inplace
    )


class FusedLoss(torch.autograd.Function):
    """Loss and gradient in one launch; backward multiplies the gradient in place and hands it over."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, kernels: RowKernels, rows: Rows, terms: Terms, inplace: bool
    ) -> tuple[Tensor, ...]:
        gradient = logits.detach() if inplace else torch.empty_like(logits)
        result = kernels.loss(rows, terms, gradient)
        if inplace:
            torch.autograd.graph.increment_version(gradient)
        anchor = logits.new_empty(0)
        ctx.save_for_backward(gradient, anchor)
        ctx.kernels = kernels
        ctx.spent = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.log_probs, result.entropy, result.sums)
        return *result, anchor

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        *_, factor, _ = upstream
        gradient, _ = ctx.saved_tensors
        ctx.spent = True
        ctx.kernels.scale(gradient, factor, gradient)
        return gradient, None, None, None, None


class FusedStatistics(torch.autograd.Function):
    """Statistics in forward; in backward, the gradient of the logits from the gradients of log-prob and entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        temperature: Tensor | None,
        transform: LogitTransform,
        kernels: StatisticsKernels,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        statistics = kernels.statistics(Rows(logits, tokens, mask, transform), entropy=entropy)
        ctx.save_for_backward(logits, tokens, mask, temperature, *statistics)
        ctx.transform, ctx.kernels, ctx.inplace = transform, kernels, inplace
        ctx.spent = False
        ctx.set_materialize_grads(False)
        return statistics.log_probs, statistics.entropy

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        logits, tokens, mask, temperature, *saved = ctx.saved_tensors
        logits, statistics = logits.detach(), RowStatistics(*saved)
        out = logits if ctx.inplace else torch.empty_like(logits)
        transform = ctx.transform if temperature is None else replace(ctx.transform, temperature=temperature)
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(statistics.log_probs)
        ctx.kernels.gradient(
            Rows(logits, tokens, mask, transform),
            statistics,
            grad_log_probs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            out,
        )
        if ctx.inplace:
            ctx.spent = True
            torch.autograd.graph.increment_version(out)
        return out, *(None,) * 7


def _check_overwritable(logits: Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    if logits.is_leaf or owner.is_leaf:
        raise ValueError(
            "inplace=True must have logits that are not a leaf of the graph or a view of one, because it overwrites "
            "them: pass the output of a computation, such as a model's logits, or inplace=False"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace=True must have logits with a separate memory location per element, got expanded ones: shape "
            f"{tuple(logits.shape)}, strides {logits.stride()}; pass inplace=False"
        )


# In a traced graph, kernels are looked up by backend name, and the temperature is always a tensor.

KERNELS: dict[str, Callable[[], RowKernels]] = {}


def traced_statistics(backend: str, rows: Rows, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """`fused_statistics` in a traced graph, with the named backend's kernels."""
    transform = rows.transform
    temperature = transform.temperature
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=rows.logits.device)
    log_probs, entropies, _, _ = row_statistics(
        rows.logits,
        rows.tokens,
        rows.mask,
        temperature,
        transform.vocab_size,
        transform.softcap,
        transform.scale,
        entropy,
        backend,
    )
    return log_probs, entropies if entropy else None


_ROWS = "Tensor logits, Tensor tokens, Tensor mask, Tensor temperature, SymInt vocab_size, float? softcap, float? scale"


@torch.library.custom_op(
    "epo_kernels::row_statistics",
    mutates_args=(),
    schema=f"({_ROWS}, bool entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def row_statistics(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float | None,
    scale: float | None,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`RowStatistics` of logits (B, T, V), fields (B, T) float32; an empty tensor if entropy is not requested."""
    rows = Rows(logits, tokens, mask, LogitTransform(vocab_size, temperature, softcap, scale))
    log_probs, entropies, maximum, total = KERNELS[backend]().statistics(rows, entropy=entropy)
    return log_probs, log_probs.new_empty(0) if entropies is None else entropies, maximum, total


@row_statistics.register_fake
def _(logits, tokens, mask, temperature, vocab_size, softcap, scale, entropy, backend):
    log_probs, maximum, total = (torch.empty_like(tokens, dtype=torch.float32).contiguous() for _ in range(3))
    return log_probs, log_probs.new_empty(tokens.shape if entropy else 0), maximum, total


@torch.library.custom_op(
    "epo_kernels::row_gradient",
    mutates_args=(),
    schema=f"({_ROWS}, Tensor[] statistics, Tensor grad_log_probs, Tensor? grad_entropy, str backend) -> Tensor",
)
def row_gradient(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: Tensor,
    vocab_size: int,
    softcap: float | None,
    scale: float | None,
    statistics: list[Tensor],
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    """Gradient of logits (B, T, V) from the gradients of log-prob and entropy (B, T) and the saved statistics."""
    rows = Rows(logits, tokens, mask, LogitTransform(vocab_size, temperature, softcap, scale))
    log_probs, entropies, maximum, total = statistics
    out = torch.empty_like(logits)
    KERNELS[backend]().gradient(
        rows,
        RowStatistics(log_probs, entropies if entropies.numel() else None, maximum, total),
        grad_log_probs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        out,
    )
    return out


@row_gradient.register_fake
def _(logits, *_):
    return torch.empty_like(logits)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, temperature, *ctx.transform, ctx.entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, tokens, mask, temperature, *output)


def _backward_of_statistics(
    ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    refuse_transforms(grad_log_probs, grad_entropy)
    logits, tokens, mask, temperature, *statistics = ctx.saved_tensors
    gradient = row_gradient(
        logits,
        tokens,
        mask,
        temperature,
        *ctx.transform,
        statistics,
        grad_log_probs,
        grad_entropy if ctx.entropy else None,
        ctx.backend,
    )
    return gradient, *(None,) * 8


def raise_twice(*_: Any) -> None:
    """The backward of the gradient operators."""
    raise RuntimeError(TWICE)


row_statistics.register_autograd(_backward_of_statistics, setup_context=_save_statistics)
row_gradient.register_autograd(raise_twice)
