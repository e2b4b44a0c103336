"""Row kernels on NVIDIA GPUs, in CUDA C++ (csrc/). GPUs with clusters read and write the logits once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from epo_kernels.aggregation import sequence_lengths
from epo_kernels.backends.native import (
    array,
    maybe_array,
    native,
    native_maximum_scale,
    native_rows,
    native_terms,
    number,
    spread_arrays,
    why_not_built,
)
from epo_kernels.declaration import ROW_SUMS
from epo_kernels.fused.rows import Prepared, RowLoss, Rows, RowStatistics, Spread, Terms
from epo_kernels.inputs import Aggregation, LogitTransform, Scalar

_SCALED_AT_ONCE = 1 << 26  # elements, where rows have gaps: bounds the float32 copies


def why_unavailable() -> str | None:
    """None if the kernels are built and support the current device, otherwise the reason and the fix."""
    reason = why_not_built()
    if reason is not None:
        return reason
    module = native()
    if module.cuda_missing is not None:
        return (
            f"the native module has no CUDA kernels: {module.cuda_missing}; put nvcc (CUDA 12.8 or newer) on PATH and "
            "run `pip install -v -e .` again"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; run on a machine with one and a CUDA build of torch"
    return _why_unsupported(torch.cuda.current_device())


@cache
def _why_unsupported(device: int) -> str | None:
    module = native()
    said = module.cuda_unsupported(device)
    if said is None:
        return None
    return (
        f"the kernels were compiled for {module.cuda_archs}, and on this device CUDA reports: {said}; set "
        "EPO_KERNELS_CUDA_ARCHS to its compute capability and run `pip install -v -e .` again"
    )


class CudaRows:
    """`RowKernels` on CUDA tensors: launches on the current stream, without a sync.

    Args:
        family: kernels used for a loss with gradient. "chosen": the ring (one read, one write) if chip, width and
            alignment allow it, otherwise the sweeps; "ring" or "sweeps" force one, for tests and measurements.

    Attributes:
        ran: the family of the last row launch, "ring" or "sweeps"; None before the first.
    """

    def __init__(self, family: str = "chosen") -> None:
        self._native = native()
        self._family = family
        self.ran: str | None = None

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        log_probs, entropies, maximum, total = (_results(rows) for _ in range(4))
        self.ran = "sweeps"
        self._native.cuda_statistics(
            native_rows(rows),
            array(log_probs),
            array(entropies) if entropy else None,
            array(maximum),
            array(total),
            *_place(rows.logits),
        )
        return RowStatistics(log_probs, entropies if entropy else None, maximum, total)

    def spread(self, rows: Rows, statistics: RowStatistics) -> Spread:
        spread = Spread(_results(rows), _results(rows))
        self.ran = "sweeps"
        self._native.cuda_spread(native_rows(rows), *spread_arrays(statistics, spread), *_place(rows.logits))
        return spread

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        self.ran = "sweeps"
        self._native.cuda_gradient(
            native_rows(rows),
            array(statistics.log_probs),
            maybe_array(statistics.entropy),
            array(statistics.maximum),
            array(statistics.sum),
            array(grad_log_probs),
            maybe_array(grad_entropy),
            array(out),
            *_place(rows.logits),
        )

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        log_probs, entropy = _results(rows), _results(rows)
        device, stream = _place(rows.logits)
        sums = torch.empty(len(ROW_SUMS), dtype=torch.float64, device=rows.logits.device)
        loss = torch.empty((), dtype=torch.float32, device=rows.logits.device)
        workspace = torch.empty(self._native.cuda_workspace_size(device), dtype=torch.float64, device=sums.device)
        checked = native_rows(rows)
        self.ran = self._native.cuda_loss(
            checked,
            native_terms(checked, terms),
            maybe_array(out),
            array(log_probs),
            array(entropy),
            array(sums),
            array(loss),
            array(workspace),
            array(terms.ticket),
            device,
            stream,
            self._family,
        )
        return RowLoss(log_probs, entropy, sums, loss)

    def prepare(self, mask: Tensor, aggregation: Aggregation, coefficients: tuple[Scalar, ...]) -> Prepared:
        device = mask.device
        lengths = sequence_lengths(mask, aggregation.sequence_ids, aggregation.num_sequences)
        prepared = Prepared(
            weights=torch.empty(mask.shape, dtype=torch.float32, device=device),
            coefficients=torch.empty(len(coefficients), dtype=torch.float32, device=device),
            ticket=torch.empty(1, dtype=torch.int32, device=device),
            extras=torch.empty(2, dtype=torch.float64, device=device),
        )
        numbers = [number(value, device) for value in (aggregation.loss_scale, *coefficients)]
        normalizer = None if aggregation.normalizer is None else number(aggregation.normalizer, device)
        scale, *values = (array(value) if isinstance(value, Tensor) else value for value in numbers)
        self._native.cuda_prepare(
            array(mask),
            array(lengths),
            maybe_array(aggregation.sequence_ids),
            aggregation.loss_agg_mode,
            array(normalizer) if isinstance(normalizer, Tensor) else normalizer,
            scale,
            float(aggregation.max_length or 1),
            values,
            *(array(result) for result in prepared),
            *_place(mask),
        )
        return prepared

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        return native_maximum_scale(transform)

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        factor = factor.to(torch.float32)
        # A dense tensor that is only transposed becomes contiguous.
        outermost_first = sorted(range(3), key=gradient.stride, reverse=True)
        gradient, out = gradient.permute(outermost_first), out.permute(outermost_first)
        whole = gradient.is_contiguous() and out.is_contiguous()
        for own, result in [(gradient, out)] if whole else zip(gradient, out, strict=True):
            if own.is_contiguous() and result.is_contiguous():
                self._native.cuda_scale(array(own), array(factor), array(result), *_place(own))
            else:  # rows with gaps; torch.mul(own, factor, out=result) would round the factor to 16 bits
                rows = max(_SCALED_AT_ONCE // max(own.shape[1], 1), 1)
                for some, scaled in zip(own.split(rows), result.split(rows), strict=True):
                    scaled.copy_(some.to(torch.float32) * factor)


def _results(rows: Rows) -> Tensor:
    return torch.empty(rows.tokens.shape, dtype=torch.float32, device=rows.logits.device)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Ordinal and current stream of the tensor's device."""
    device = tensor.device
    return tensor.get_device(), torch.cuda.current_stream(device).cuda_stream
