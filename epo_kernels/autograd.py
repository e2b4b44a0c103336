"""The limits of fused gradients: first derivatives, in reverse mode, of plain tensors.

Whatever else is asked raises here. PyTorch itself would return zeros or a part of the result, or raise an error about
its internals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SPENT = (
    "the gradient of this fused loss has been given away by an earlier backward: it was made once, and backward hands "
    'it on. Call the loss again, or take backend="reference", whose graph can be walked more than once '
    "(retain_graph=True)"
)
TWICE = (
    "fused backends, and any with group=, compute first derivatives only; this gradient can't be differentiated again "
    '(create_graph=True). Use backend="reference", without group=, or detach the gradient'
)
TRANSFORMED = (
    "fused backends, and any with group=, can't run under {cause}: they read plain tensors and compute reverse-mode "
    'gradients. Use backend="reference", without group='
)

Backward = Callable[..., tuple[Tensor | None, ...]]


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise where a kernel would fail on wrapped tensors, or drop the tangent of one of these.

    Raises:
        RuntimeError: inside a `torch.func` transform or vmap, or a tensor carries a forward-mode tangent.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(TRANSFORMED.format(cause="torch.func transforms (grad, jvp, vmap, ...)"))
    if torch.compiler.is_compiling():
        return
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(map(torch._C._has_storage, given)):  # batched by a vmap that isn't torch.func's
        raise RuntimeError(TRANSFORMED.format(cause="is_grads_batched=True"))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(TRANSFORMED.format(cause="forward-mode AD"))


def differentiable_once(backward: Backward) -> Backward:
    """Decorate the backward of a Function whose gradients raise when they are differentiated again.

    PyTorch's `once_differentiable` returns constants where no upstream gradient requires a gradient, and its error is
    on no path to the inputs, so `torch.autograd.grad` never meets it. Here the path leads through a tensor that the
    Function saves for backward: an input or an output, such as an empty `anchor` that is returned for nothing else.

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
    """A gradient as it is, whose own derivative in the sources raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(TWICE)
