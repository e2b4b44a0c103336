"""Checks of single arguments: tensors, integers, scalars, and tensor values where they may be read."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import os
import reprlib
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOW_PRECISION = (torch.float16, torch.bfloat16)


def tracing() -> bool:
    """Whether a graph is being traced, by `torch.compile` or a FakeTensorMode: tensors then have no memory to read."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def checks_values(device: torch.device) -> bool:
    """Whether values may be read: always on the CPU, on request on other devices, never while tracing."""
    if tracing() or device.type == "meta" or torch._C._are_functorch_transforms_active():
        return False
    return device.type == "cpu" or os.environ.get("EPO_KERNELS_CHECK", "0") == "1"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all statistics: float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise TypeError or ValueError unless value is a tensor of that shape on that device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor()")
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}{squeeze_hint(name, value, shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where logits or hidden states are, got {value.device}")


def squeeze_hint(name: str, value: Tensor, shape: torch.Size) -> str:
    """The fix to append to an error if the shape is right except for a batch dimension of 1."""
    return f"; pass {name}.squeeze(0)" if value.shape == (1, *shape) else ""


def as_integer(name: str, value: SupportsIndex, low: int, high: int | None = None, meaning: str = "") -> int:
    """An int, or an integer-like value (a NumPy integer, not a bool), between low and high.

    Raises:
        ValueError: not an integer in range; the message gives the name, the range, its meaning and the value.
    """
    given = value
    if not isinstance(value, (bool, int)) and hasattr(value, "__index__"):
        with contextlib.suppress(TypeError):  # raised for a tensor that is not an integer
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an int {wanted}{meaning}, got {reprlib.repr(given)}")
    return value


def check_precise(name: str, value: Any) -> None:
    """Raise TypeError if value is a tensor of 16-bit floats."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}, whose rounding alone changes importance ratios by "
            "up to 3 % and counts by 0.4 %. Keep it in float32 from where it is computed; casting it back restores "
            "nothing. FSDP's mixed precision casts the inputs of a module that contains the loss: set "
            "MixedPrecisionPolicy(cast_forward_inputs=False) (FSDP1: MixedPrecision(cast_root_forward_inputs=False))"
        )


def as_scalar(name: str, value: Scalar, low: float = -math.inf, open_low: bool = False) -> Scalar:
    """A finite number in range, or a 0-d tensor (whose value is not read)."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {reprlib.repr(value)} ({type(value).__name__})")
    if torch.compiler.is_compiling():  # a guard on the value would recompile at every step of a schedule
        return value
    if not math.isfinite(value) or value < low or (open_low and value == low):
        wanted = f" and {'>' if open_low else '>='} {low:g}" if low > -math.inf else ""
        raise ValueError(f"{name} must be finite{wanted}, got {value}")
    return float(value)


class InvalidTokens:
    """Collects counted tokens with an inconsistent argument.

    If values may be read, the first one raises. Otherwise they end up in `TokenInputs.invalid`: the loss becomes NaN
    and counts them.

    Attributes:
        where: (B, T) bool, or None if no token can be invalid.
    """

    def __init__(self, device: torch.device) -> None:
        self.where: Tensor | None = None
        self._raises = checks_values(device)

    def mark(self, bad: Tensor) -> None:
        """Mark the tokens in bad, (B, T) bool, as invalid."""
        self.where = bad if self.where is None else self.where | bad

    def reject(self, bad: Tensor, values: Tensor, message: str, limit: int | None = None) -> None:
        """Raise for the first bad token (B, T), with its value; if values cannot be read, mark the bad tokens instead.

        message contains {limit} unformatted: a size in a string would become a constant of the compiled graph.
        """
        if not self._raises:
            self.mark(bad)
        elif bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            value = values[tuple(place)].tolist()
            raise ValueError(f"{message.format(limit=limit)}, got {value} at row {place[0]}, position {place[1]}")
