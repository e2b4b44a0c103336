"""Common parts of the two native backends: the compiled module, and tensor conversion."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from epo_kernels.declaration import NATIVE_NAMES
from epo_kernels.fused.rows import Rows, RowStatistics, Spread, Terms
from epo_kernels.inputs import LogitTransform, Scalar


def _why_stale(module: ModuleType) -> str | None:
    """None if the module was built from the current declaration, otherwise the difference and the fix."""
    built = getattr(module, "declared_names", {})
    different = [key for key, names in NATIVE_NAMES.items() if built.get(key) != names]
    if not different:
        return None
    return (
        f"the native module {module.__file__} was built before epo_kernels/declaration.py changed "
        f"({', '.join(different)} differ); rebuild it with `pip install -v -e .`"
    )


try:
    import epo_kernels._native as _native

    _WHY_MISSING = _why_stale(_native)
except ImportError as error:
    _WHY_MISSING = (
        f"the native module is not built ({error}); install a C++17 compiler (g++ 9 or later) and run "
        "`pip install -v -e .` again, whose output shows the build log"
    )
if _WHY_MISSING is not None:
    _native = None  # type: ignore[assignment]

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


def native() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not built, or was built from another declaration.
    """
    if _native is None:
        raise RuntimeError(_WHY_MISSING)
    return _native


def why_not_built() -> str | None:
    """None if the compiled module can be used, otherwise the reason and the fix."""
    return _WHY_MISSING if _native is None else None


def array(tensor: Tensor) -> _native.Array:
    """A view of the tensor's memory, which keeps the tensor alive."""
    storage = tensor.untyped_storage()
    return _native.Array(
        tensor.data_ptr(),
        _DTYPE_NAMES[tensor.dtype],
        tensor.shape,
        tensor.stride(),
        storage.data_ptr(),
        storage.nbytes(),
        tensor,
    )


def maybe_array(tensor: Tensor | None) -> _native.Array | None:
    return None if tensor is None else array(tensor)


def number(value: Scalar, device: torch.device) -> float | Tensor:
    """A float, or a float32 tensor on the device; a 0-d CPU tensor is read, which costs no sync."""
    if not isinstance(value, Tensor):
        return float(value)
    return float(value) if value.dim() == 0 and value.device.type == "cpu" else value.to(device, torch.float32)


def native_rows(rows: Rows) -> _native.Rows:
    transform = rows.transform
    temperature = number(transform.temperature, rows.logits.device)
    return _native.Rows(
        array(rows.logits),
        array(rows.tokens),
        array(rows.mask),
        array(temperature.expand(rows.tokens.shape)) if isinstance(temperature, Tensor) else temperature,
        transform.vocab_size,
        transform.scale,
        transform.softcap,
    )


def spread_arrays(statistics: RowStatistics, spread: Spread) -> tuple[_native.Array, ...]:
    """What `cpu_spread` and `cuda_spread` read and fill."""
    assert statistics.entropy is not None
    return tuple(map(array, (statistics.entropy, statistics.maximum, statistics.sum, *spread)))


def native_maximum_scale(transform: LogitTransform) -> Scalar:
    """`StatisticsKernels.maximum_scale`: the `outer` of csrc/epo_math.h."""
    if transform.softcap is not None:
        return transform.softcap / transform.temperature
    return abs(1.0 if transform.scale is None else transform.scale) / transform.temperature


def native_terms(rows: _native.Rows, terms: Terms) -> _native.Terms:
    return _native.Terms(
        rows,
        array(terms.weights),
        array(terms.advantages),
        maybe_array(terms.old_log_probs),
        maybe_array(terms.ref_log_probs),
        maybe_array(terms.is_weights),
        maybe_array(terms.lower),
        maybe_array(terms.upper),
        array(terms.coefficients),
        terms.policy_loss,
        terms.penalty,
        terms.kl_type,
    )
