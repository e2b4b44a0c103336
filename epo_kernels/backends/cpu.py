"""Row kernels on the CPU, in C++ (csrc/): vectorised for the available instruction set, on PyTorch's thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from epo_kernels.backends.native import (
    array,
    maybe_array,
    native,
    native_maximum_scale,
    native_rows,
    native_terms,
    spread_arrays,
)
from epo_kernels.declaration import ROW_SUMS
from epo_kernels.fused.backend import PlainHelpers
from epo_kernels.fused.rows import RowLoss, Rows, RowStatistics, Spread, Terms
from epo_kernels.inputs import LogitTransform, Scalar


class CpuRows(PlainHelpers):
    """`RowKernels` on CPU tensors.

    Args:
        instructions: instruction set, one of the native module's `cpu_instructions()`; None: the best available.
    """

    def __init__(self, instructions: str | None = None) -> None:
        self._native = native()
        self._instructions = instructions

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        log_probs, entropies, maximum, total = (_results(rows) for _ in range(4))
        self._native.cpu_statistics(
            native_rows(rows),
            array(log_probs),
            array(entropies) if entropy else None,
            array(maximum),
            array(total),
            torch.get_num_threads(),
            self._instructions,
        )
        return RowStatistics(log_probs, entropies if entropy else None, maximum, total)

    def spread(self, rows: Rows, statistics: RowStatistics) -> Spread:
        spread = Spread(_results(rows), _results(rows))
        self._native.cpu_spread(
            native_rows(rows),
            *spread_arrays(statistics, spread),
            torch.get_num_threads(),
            self._instructions,
        )
        return spread

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        self._native.cpu_gradient(
            native_rows(rows),
            array(statistics.log_probs),
            maybe_array(statistics.entropy),
            array(statistics.maximum),
            array(statistics.sum),
            array(grad_log_probs),
            maybe_array(grad_entropy),
            array(out),
            torch.get_num_threads(),
            self._instructions,
        )

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        log_probs, entropy = _results(rows), _results(rows)
        sums = torch.empty(len(ROW_SUMS), dtype=torch.float64, device="cpu")
        checked = native_rows(rows)
        self._native.cpu_loss(
            checked,
            native_terms(checked, terms),
            maybe_array(out),
            array(log_probs),
            array(entropy),
            array(sums),
            torch.get_num_threads(),
            self._instructions,
        )
        return RowLoss(log_probs, entropy, sums, sums[ROW_SUMS.index("loss")].to(torch.float32))

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        return native_maximum_scale(transform)

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        value = float(factor)
        if out is gradient and gradient.is_contiguous() and value != 1.0:
            self._native.cpu_scale(array(gradient), value, torch.get_num_threads(), self._instructions)
        else:
            super().scale(gradient, factor, out)


def _results(rows: Rows) -> Tensor:
    return torch.empty(rows.tokens.shape, dtype=torch.float32, device="cpu")
