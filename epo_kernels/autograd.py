"""Limits of the fused gradients: first derivatives, in reverse mode, of plain tensors.

Anything else raises here. PyTorch itself would return zeros or partial results, or raise an error about its internals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SPENT = (
    "the gradient of this fused loss was already consumed by an earlier backward pass: it is computed once and then "
    'handed over. Call the loss again, or use backend="reference", which supports several backward passes '
    "(retain_graph=True)"
)
TWICE = (
    "fused backends, and any backend with group=, compute first derivatives only; this gradient cannot be "
    'differentiated again (create_graph=True). Use backend="reference" without group=, or detach the gradient'
)
TRANSFORMED = (
    "fused backends, and any backend with group=, cannot run under {cause}: they read plain tensors and compute "
    'reverse-mode gradients. Use backend="reference" without group='
)

Backward = Callable[..., tuple[Tensor | None, ...]]


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise if a kernel would fail on wrapped tensors or silently drop a forward-mode tangent.

    Raises:
        RuntimeError: inside a `torch.func` transform or vmap, or if a tensor carries a forward-mode tangent.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(TRANSFORMED.format(cause="torch.func transforms (grad, jvp, vmap, ...)"))
    if torch.compiler.is_compiling():
        return
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(map(torch._C._has_storage, given)):  # batched by a vmap outside torch.func
        raise RuntimeError(TRANSFORMED.format(cause="is_grads_batched=True"))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(TRANSFORMED.format(cause="forward-mode AD"))


def differentiable_once(backward: Backward) -> Backward:
    """Decorate a Function's backward so that differentiating its gradients again raises.

    PyTorch's `once_differentiable` returns constants if no upstream gradient requires a gradient, and its error node is
    not on a path to the inputs, so `torch.autograd.grad` never reaches it. Here the path goes through a tensor that the
    Function saves for backward: an input or an output, such as an empty `anchor` returned for this purpose only.

    A Function whose gradient can be handed out only once sets `ctx.spent`.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(value is None for value in upstream):
            return (None,) * len(ctx.needs_input_grad)
        refuse_transforms(*upstream)
        if getattr(ctx, "spent", False):
            raise RuntimeError(SPENT)
        sources = (*ctx.saved_tensors, *upstream) if torch.is_grad_enabled() else ()
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not sources:
            return gradients
        return tuple(None if value is None else _Final.apply(value, *sources) for value in gradients)

    return wrapper


class _Final(torch.autograd.Function):
    """Identity on a gradient; its own derivative with respect to the sources raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(TWICE)
