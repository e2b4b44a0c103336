"""The linear statistics as two functional `torch.library` operators, for traced graphs.

The number of counted tokens is known only when the graph runs, so dropping masked rows and looping over chunks happen
inside the operators; everything between them, such as a loss, is traced. Logits are computed twice: 8 N D V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epo_kernels.autograd import refuse_transforms
from epo_kernels.fused.head import unmasked_tokens
from epo_kernels.fused.linear import (
    gradients_of_head,
    head_maker,
    nan_if_miscounted,
    row_maker,
    statistics_of_head,
)
from epo_kernels.fused.ops import KERNELS, raise_twice
from epo_kernels.fused.rows import RowStatistics, kernel_tokens
from epo_kernels.inputs import Chunking, LogitTransform, Projection, TokenInputs

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor mask, Tensor temperature, SymInt vocab_size, "
    "float? softcap, float? scale, ScalarType product_dtype, ScalarType logits_dtype, SymInt? num_active, "
    "SymInt max_chunk_bytes, str backend"
)


def traced_linear_statistics(
    backend: str, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`linear.linear_log_probs_and_entropy` in a traced graph, with the named backend's kernels."""
    transform = inputs.transform
    temperature = transform.temperature
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=inputs.mask.device)
    log_probs, entropies, _, _ = linear_statistics(
        projection.hidden,
        projection.weight,
        projection.bias,
        kernel_tokens(inputs),
        inputs.mask,
        temperature,
        transform.vocab_size,
        transform.softcap,
        transform.scale,
        projection.product_dtype,
        projection.logits_dtype,
        chunking.num_active,
        chunking.max_chunk_bytes,
        backend,
        entropy,
    )
    factor = nan_if_miscounted(inputs.mask, chunking.num_active)
    return log_probs * factor, entropies * factor if entropy else None


class _Call:
    """The common arguments of both operators, in schema order, and the objects built from them."""

    def __init__(self, hidden, weight, bias, tokens, mask, temperature, vocab_size, softcap, scale, *rest) -> None:
        product_dtype, logits_dtype, num_active, max_chunk_bytes, backend = rest
        projection = Projection(hidden, weight, bias, product_dtype, logits_dtype)
        self.unmasked = unmasked_tokens(mask, num_active)
        transform = LogitTransform(vocab_size, temperature, softcap, scale)
        self.rows_of = row_maker(transform, tokens, self.unmasked)
        make_head = head_maker(projection, transform, self.unmasked, Chunking(num_active, max_chunk_bytes))
        self.head = make_head(hidden, weight, bias)
        self.kernels = KERNELS[backend]()


@torch.library.custom_op(
    "epo_kernels::linear_statistics",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`RowStatistics` of a head's logits, each (B, T) float32; an empty tensor if entropy is not requested."""
    *common, entropy = arguments
    call, tokens = _Call(*common), common[3]
    statistics = statistics_of_head(call.kernels, call.head, call.rows_of, entropy=entropy)
    log_probs, entropies, maximum, total = (
        tokens.new_empty(0, dtype=torch.float32) if values is None else call.unmasked.put(values, tokens.shape)
        for values in statistics
    )
    return log_probs, entropies, maximum, total


@linear_statistics.register_fake
def _(hidden, weight, bias, tokens, *rest):
    log_probs, maximum, total = (tokens.new_empty(tokens.shape, dtype=torch.float32) for _ in range(3))
    entropy = rest[-1]
    return log_probs, log_probs.new_empty(tokens.shape if entropy else 0), maximum, total


@torch.library.custom_op(
    "epo_kernels::linear_gradient",
    mutates_args=(),
    schema=(
        f"({_ARGUMENTS}, Tensor[] statistics, Tensor grad_log_probs, Tensor? grad_entropy, bool[] needs) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def linear_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias from those of log-prob and entropy (B, T); empty if not needed."""
    *common, saved, grad_log_probs, grad_entropy, needs = arguments
    call = _Call(*common)
    take = call.unmasked.take_row
    log_probs, entropy, maximum, total = saved
    statistics = RowStatistics(take(log_probs), take(entropy) if entropy.numel() else None, take(maximum), take(total))
    gradients = gradients_of_head(
        call.kernels,
        call.head,
        call.rows_of,
        statistics,
        take(grad_log_probs),
        None if grad_entropy is None else take(grad_entropy),
        tuple(needs),
    )
    hidden, weight, bias = (  # a separate empty tensor for each: outputs of an operator must not alias
        arguments[0].new_empty(0) if value is None else value.contiguous() for value in gradients.finish()
    )
    return hidden, weight, bias


@linear_gradient.register_fake
def _(hidden, weight, bias, *rest):
    needs = rest[-1]
    contiguous = torch.contiguous_format
    return tuple(
        torch.empty_like(value, memory_format=contiguous) if need else hidden.new_empty(0)
        for value, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.vocab_size, ctx.softcap, ctx.scale = inputs[:9]
    ctx.rest, ctx.entropy = inputs[9:-1], inputs[-1]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_transforms(grad_log_probs, grad_entropy)
    tensors, statistics = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_gradient(
        *tensors,
        ctx.vocab_size,
        ctx.softcap,
        ctx.scale,
        *ctx.rest,
        list(statistics),
        grad_log_probs,
        grad_entropy if ctx.entropy else None,
        needs,
    )
    wanted = (value if need else None for value, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 12


linear_statistics.register_autograd(_backward, setup_context=_save)
linear_gradient.register_autograd(raise_twice)
