"""The layouts of per-token arguments, padded (B, T) or packed (N,), and their conversion to (B, T)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epo_kernels.inputs import checks
from epo_kernels.inputs.checks import (
    LOGIT_DTYPES,
    check_precise,
    check_tensor,
    compute_dtype,
    squeeze_hint,
)


@dataclass(frozen=True)
class Layout:
    """The layout of the caller's per-token arguments, and their conversion to (B, T).

    Attributes:
        shape: the caller's shape of tokens: (B, T), or (N,) packed.
        device, dtype: device of the rows, and dtype of their statistics.
        sequence_ids, num_sequences: as in `TokenInputs`.
        in_order: 0-d bool, whether cu_seqlens is valid, if that cannot be read; otherwise None.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    sequence_ids: Tensor | None
    num_sequences: int
    in_order: Tensor | None

    @property
    def packed(self) -> bool:
        return len(self.shape) == 1

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """A tensor shaped like tokens, viewed as (B, T)."""
        check_tensor(name, value, self.shape, self.device)
        return value[None] if self.packed else value

    def floats(self, name: str, value: Tensor, *, a_sequence: bool = False) -> Tensor:
        """A float argument like tokens (or, if allowed, one per sequence) as (B, T) in the layout's dtype, detached."""
        by_sequence = a_sequence and isinstance(value, Tensor) and value.shape == (self.num_sequences,) != self.shape
        if by_sequence and self.packed and self.sequence_ids is None:
            raise ValueError(f"cu_seqlens must be given to expand {name} {tuple(value.shape)} to packed tokens")
        if isinstance(value, Tensor) and value.shape != self.shape and not by_sequence:
            otherwise = f", or one value per sequence ({self.num_sequences},)" if a_sequence else ""
            raise ValueError(
                f"{name} must have the shape of tokens {tuple(self.shape)}{otherwise}, got {tuple(value.shape)}"
                f"{squeeze_hint(name, value, self.shape)}"
            )
        check_tensor(name, value, value.shape if by_sequence else self.shape, self.device)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {value.dtype}")
        value = value.detach().to(self.dtype)
        if not by_sequence:
            return value[None] if self.packed else value
        return value[self.sequence_ids] if self.packed else value[:, None].expand(self.shape)

    def log_probs(self, name: str, value: Tensor) -> Tensor:
        """`floats` for log-probs, whose differences require full precision."""
        check_precise(name, value)
        return self.floats(name, value)


def as_rows(
    rows: Tensor, tokens: Tensor, cu_seqlens: Tensor | None, name: str = "logits", *, least_width: int = 1
) -> tuple[Tensor, Layout]:
    """Logits (or hidden states) as (B, T, width), a view, and the layout of all accompanying arguments.

    least_width: 0 if a rank may have no column of the vocabulary.

    Raises:
        TypeError, ValueError: invalid argument; the message gives its name, the allowed values and the value.
    """
    for label, value in ((name, rows), ("tokens", tokens)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
    if rows.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {rows.dtype}")
    if rows.dim() not in (2, 3) or rows.shape[-1] < least_width:
        raise ValueError(
            f"{name} must be (batch, time, width) or packed (tokens, width) with width > 0, got {tuple(rows.shape)}"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 (or int32), got {tokens.dtype}")
    layout = as_layout(rows.shape[:-1], rows.device, rows.dtype, cu_seqlens, name)
    check_tensor("tokens", tokens, layout.shape, layout.device)
    return rows if rows.dim() == 3 else rows[None], layout


def as_layout(
    shape: torch.Size, device: torch.device, dtype: torch.dtype, cu_seqlens: Tensor | None, name: str
) -> Layout:
    """The layout of arguments of that shape, (B, T) or packed (N,).

    Args:
        dtype: dtype of the logits, or of the argument that replaces them.
        name: the argument that defines the shape.

    Raises:
        TypeError, ValueError: invalid cu_seqlens; the message gives the allowed values and the value.
    """
    packed = len(shape) == 1
    if cu_seqlens is None:
        return Layout(shape, device, compute_dtype(dtype), None, 1 if packed else shape[0], None)
    if not packed:
        fix = (
            f"pass {name}.squeeze(0), and squeeze(0) of every argument shaped like tokens"
            if shape[0] == 1
            else "pack the rows into one, or omit cu_seqlens"
        )
        raise ValueError(f"cu_seqlens goes with packed {name}, got a padded batch of {shape[0]}; {fix}")
    return Layout(shape, device, compute_dtype(dtype), *_sequences(shape[0], device, cu_seqlens))


def _sequences(num_tokens: int, device: torch.device, cu_seqlens: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """sequence_ids (1, N), number of sequences, in_order of a packed batch."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens must be (num_sequences + 1,) on {device}, got {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}{squeeze_hint('cu_seqlens', cu_seqlens, cu_seqlens.shape[1:])}"
        )
    in_order: Tensor | None = None
    if not checks.checks_values(device):
        rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        in_order = rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    else:
        _check_borders(cu_seqlens.tolist(), num_tokens)
    num_sequences = cu_seqlens.shape[0] - 1
    positions = torch.arange(num_tokens, device=device, dtype=cu_seqlens.dtype)
    # Tokens past the last boundary are possible only if values are not read.
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True).clamp(max=num_sequences - 1)
    return ids[None], num_sequences, in_order


def _check_borders(borders: list[int], num_tokens: int) -> None:
    fall = next((place for place in range(1, len(borders)) if borders[place] < borders[place - 1]), None)
    if borders[0] != 0:
        got = f"{borders[0]} as its first border"
    elif fall is not None:
        got = f"{borders[fall]} after {borders[fall - 1]} at place {fall} of {len(borders)}"
    elif borders[-1] != num_tokens:
        got = f"{borders[-1]} as its last border"
    else:
        return
    raise ValueError(f"cu_seqlens must rise from 0 to the {num_tokens} tokens, got {got}")
