"""The backends: who computes the rows. One file each, one protocol, one registry."""

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
    """Differentiable row operations over checked arguments. Logits are (B, T, V); packed batches are (1, N, V)."""

    name: str
    dtypes: tuple[torch.dtype, ...]  # dtypes of logits; none: any

    @property
    def device_types(self) -> tuple[str, ...]:
        """torch device types it computes on; none: any."""

    def why_unavailable(self) -> str | None:
        """None where it can run on this machine, else why not and how to fix it."""

    def sharded(self, shard: Shard) -> Backend:
        """The same for a rank's part of the vocabulary: logits, weight and bias; the transform is the whole's."""

    def epo_loss(self, logits: Tensor, inputs: LossInputs, *, inplace: bool) -> EPOOutput:
        """The whole loss, differentiable in logits. inplace: logits may be overwritten with their gradient."""

    def log_probs_and_entropy(
        self, logits: Tensor, inputs: TokenInputs, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob and entropy of each token (B, T), both differentiable in logits; no entropy where not asked for."""

    def distribution_statistics(self, logits: Tensor, inputs: TokenInputs) -> DistributionStatistics:
        """Statistics of each token's distribution, (B, T) each. Called without gradients."""

    def linear_distribution_statistics(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking
    ) -> DistributionStatistics:
        """`distribution_statistics` of a head's logits."""

    def linear_epo_loss(self, projection: Projection, inputs: LossInputs, chunking: Chunking) -> EPOOutput:
        """The whole loss of a head's logits, differentiable in hidden states, weight and bias."""

    def linear_log_probs_and_entropy(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`log_probs_and_entropy` of a head's logits, differentiable in hidden states, weight and bias."""


_BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "cpu": FusedBackend("cpu", ("cpu",), CpuRows, native.why_not_built),
    "cuda": FusedBackend("cuda", ("cuda",), CudaRows, cuda.why_unavailable),
    "triton": triton.TritonBackend("triton", ("cuda",), triton.TritonRows, triton.why_unavailable),
}
# What backend="auto" takes: of a device type's, the first that can run, else the reference. (Triton's interpreter takes
# CPU tensors too, but only when asked by name: it is slow. The CUDA kernels come second until their suite has passed on
# a GPU: so far it has passed on an emulated one, tests/native/emulator.)
_PREFERENCE = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None where it can run on this machine and else the reason why it can't."""
    return {name: backend.why_unavailable() for name, backend in _BACKENDS.items()}


@cache
def _warn_of_reference(reasons: str) -> None:
    warnings.warn(
        f"no fused backend can run here, the loss is computed by eager PyTorch, in many passes and with whole logits "
        f"({reasons})",
        stacklevel=4,
    )


def choose_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend of that name, or for "auto" the best that runs on the device, for logits of that dtype.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that can't run here, with the reason and the fix.
    """
    if name == "auto":
        candidates = [n for n in _PREFERENCE.get(device.type, ()) if dtype in _BACKENDS[n].dtypes]
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
        raise RuntimeError(f"backend={name!r} can't run here: {reason}")
    if backend.device_types and device.type not in backend.device_types:
        raise RuntimeError(
            f"backend={name!r} computes on {' or '.join(backend.device_types)}, the logits are on {device}; "
            'move them, or take backend="auto"'
        )
    if backend.dtypes and dtype not in backend.dtypes:
        names = ", ".join(str(known) for known in backend.dtypes)
        raise RuntimeError(
            f'backend={name!r} computes on logits of {names}, got {dtype}; cast them, or take backend="auto"'
        )
    return backend
