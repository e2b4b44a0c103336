"""The language-model head of the linear losses, and the chunks in which it is applied."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from epo_kernels.inputs import checks
from epo_kernels.inputs.checks import LOGIT_DTYPES, as_integer, check_tensor, compute_dtype
from epo_kernels.inputs.layout import Layout
from epo_kernels.shard import Shard


@dataclass(frozen=True)
class Projection:
    """A language-model head: logits = hidden weightᵀ + bias.

    Attributes:
        hidden: (B, T, D), any strides; a packed batch is (1, N, D).
        weight: (V, D), any strides.
        bias: (V,) or None.
        product_dtype: dtype of the product's operands: their promoted dtype, or autocast's. Autocast does not apply to
            float64, or to products whose logits are requested in another dtype than its own.
        logits_dtype: dtype of the logits: the products' own, or a wider one.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product_dtype: torch.dtype
    logits_dtype: torch.dtype


@dataclass(frozen=True)
class Chunking:
    """How a head is applied to its tokens.

    Attributes:
        num_active: number of tokens whose mask is 1, if known.
        max_chunk_bytes: memory limit of a chunk of tokens.
        shard: the part of the vocabulary covered by weight and bias; None if they cover all of it.
    """

    num_active: int | None
    max_chunk_bytes: int
    shard: Shard | None = None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep their operands' dtypes; no-op on devices without autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts products to; None if autocast is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def as_projection(
    layout: Layout, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> tuple[Projection, Layout]:
    """The head, with hidden already validated as rows (B, T, D), and the layout with the dtype of its statistics.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    width = hidden.shape[-1]
    if not isinstance(weight, Tensor) or weight.dtype not in LOGIT_DTYPES:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a float32, float16, bfloat16 or float64 tensor, got {kind}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight must be (vocabulary, {width}) to match hidden's width {width}, got {tuple(weight.shape)}"
        )
    check_tensor("weight", weight, weight.shape, hidden.device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], hidden.device)
    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if bias is not None and bias.dtype not in (set(LOGIT_DTYPES) - {torch.float64} | {product_dtype}):
        raise TypeError(
            "bias must be a float32, float16 or bfloat16 tensor (float64 if hidden states or weight are), got "
            f"{bias.dtype}"
        )
    cast_to = autocast_dtype(hidden.device)
    if cast_to is not None and product_dtype != torch.float64 and logits_dtype in (None, cast_to):
        product_dtype = cast_to
    allowed = dict.fromkeys((product_dtype, torch.promote_types(product_dtype, torch.float32)))
    if logits_dtype is None:
        logits_dtype = product_dtype
    if logits_dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"logits_dtype must be {names} if products are in {product_dtype}, got {logits_dtype}")
    projection = Projection(hidden, weight, bias, product_dtype, logits_dtype)
    return projection, replace(layout, dtype=compute_dtype(logits_dtype))


def as_chunking(num_active: int | None, max_chunk_bytes: int, mask: Tensor, shard: Shard | None) -> Chunking:
    """Both numbers, validated against a validated mask (B, T).

    Raises:
        ValueError: one of them is not an int, or is inconsistent with the mask.
    """
    if num_active is not None:
        num_active = as_integer("num_active", num_active, 0, mask.numel(), " (the number of tokens)")
        if checks.checks_values(mask.device) and int(mask.sum()) != num_active:
            raise ValueError(
                f"num_active must be {int(mask.sum())}, the number of tokens whose mask is 1, got {num_active}"
            )
    return Chunking(num_active, as_integer("max_chunk_bytes", max_chunk_bytes, 1), shard)
