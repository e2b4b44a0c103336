"""The backends that compute the rows: one file each, one protocol, one registry."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from epo_kernels.backends import cuda, native, triton
from epo_kernels.backends.cpu import CpuRows
from epo_kernels.backends.cuda import CudaRows
from epo_kernels.backends.reference import ReferenceBackend
from epo_kernels.fused.backend import FusedBackend
from epo_kernels.inputs import Chunking, LossInputs, Projection, TokenInputs
from epo_kernels.reference import DistributionStatistics, EPOOutput
from epo_kernels.shard import Shard


class Backend(Protocol):
    """Differentiable row operations over validated arguments. Logits are (B, T, V); packed batches are (1, N, V)."""

    name: str
    dtypes: tuple[torch.dtype, ...]  # supported dtypes of logits; empty: any

    @property
    def device_types(self) -> tuple[str, ...]:
        """Supported torch device types; empty: any."""

    def why_unavailable(self) -> str | None:
        """None if it can run on this machine, otherwise the reason and the fix."""

    def sharded(self, shard: Shard) -> Backend:
        """The same backend for a rank's part of logits, weight and bias; the transform covers the whole vocabulary."""

    def epo_loss(self, logits: Tensor, inputs: LossInputs, *, inplace: bool) -> EPOOutput:
        """The whole loss, differentiable by logits. inplace: logits may be overwritten with their gradient."""

    def log_probs_and_entropy(
        self, logits: Tensor, inputs: TokenInputs, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob and entropy of each token (B, T), both differentiable by logits; no entropy if not requested."""

    def distribution_statistics(self, logits: Tensor, inputs: TokenInputs) -> DistributionStatistics:
        """Statistics of each token's distribution, (B, T) each. Called without gradients."""

    def linear_distribution_statistics(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking
    ) -> DistributionStatistics:
        """`distribution_statistics` of a head's logits."""

    def linear_epo_loss(self, projection: Projection, inputs: LossInputs, chunking: Chunking) -> EPOOutput:
        """The whole loss of a head's logits, differentiable by hidden states, weight and bias."""

    def linear_log_probs_and_entropy(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`log_probs_and_entropy` of a head's logits, differentiable by hidden states, weight and bias."""


_BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "cpu": FusedBackend("cpu", ("cpu",), CpuRows, native.why_not_built),
    "cuda": FusedBackend("cuda", ("cuda",), CudaRows, cuda.why_unavailable),
    "triton": triton.TritonBackend("triton", ("cuda",), triton.TritonRows, triton.why_unavailable),
}
# The order in which backend="auto" tries backends, by device type, before it falls back to the reference. Triton's
# interpreter also accepts CPU tensors, but only if requested by name, because it is slow. On Hopper the CUDA kernels
# come first, because they are faster from logits; from hidden states both take nearly the same time
# (docs/performance.md). On other chips nobody has measured them.
_PREFERENCE = {"hopper": ("cuda", "triton"), "cuda": ("triton", "cuda"), "cpu": ("cpu",)}


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None if it can run on this machine and otherwise the reason why it cannot."""
    return {name: backend.why_unavailable() for name, backend in _BACKENDS.items()}


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _warn_of_reference(reasons: str) -> None:
    warnings.warn(
        f"no fused backend can run here, so the loss runs in eager PyTorch, in many passes and with the whole logits "
        f"({reasons})",
        stacklevel=4,
    )


def choose_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The named backend, or for "auto" the best one that runs on the device, for logits of that dtype.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the requested backend cannot run here; the message gives the reason and the fix.
    """
    if name == "auto":
        kind = "hopper" if device.type == "cuda" and _is_hopper(device) else device.type
        candidates = [n for n in _PREFERENCE.get(kind, ()) if dtype in _BACKENDS[n].dtypes]
        for candidate in candidates:
            if _BACKENDS[candidate].why_unavailable() is None:
                return _BACKENDS[candidate]
        if candidates and not torch.compiler.is_compiling():
            _warn_of_reference(", ".join(f"{n}: {_BACKENDS[n].why_unavailable()}" for n in candidates))
        name = "reference"
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {name!r}")
    backend = _BACKENDS[name]
    reason = backend.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    if backend.device_types and device.type not in backend.device_types:
        raise RuntimeError(
            f"backend={name!r} runs on {' or '.join(backend.device_types)}, but the logits are on {device}; "
            'move them, or use backend="auto"'
        )
    if backend.dtypes and dtype not in backend.dtypes:
        names = ", ".join(str(known) for known in backend.dtypes)
        raise RuntimeError(
            f'backend={name!r} supports logits of {names}, got {dtype}; cast them, or use backend="auto"'
        )
    return backend
