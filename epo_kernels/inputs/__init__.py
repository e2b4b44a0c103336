"""Validation of all arguments, and the records that carry the validated arguments.

Padded (B, T) and packed (N,) batches end up in the same form: a packed batch is one row, (1, N), with `sequence_ids`.
Canonical arguments (float32, int64, bool) are only viewed, never copied, so a fused backend launches only its own
kernels.

Shapes, types and devices are always checked. Values are checked where that is free: on CPU tensors, but not under
`torch.compile`, FakeTensorMode or a `torch.func` transform. On CUDA they are checked with EPO_KERNELS_CHECK=1, at the
cost of a sync. Unchecked, an invalid value makes the loss NaN and is counted in `metrics.invalid_tokens`.
"""

from epo_kernels.inputs.batch import TokenBatch, as_token_batch
from epo_kernels.inputs.checks import (
    Scalar,
    as_integer,
    as_scalar,
    check_precise,
    check_tensor,
    checks_values,
    compute_dtype,
    tracing,
)
from epo_kernels.inputs.head import Chunking, Projection, as_chunking, as_projection, without_autocast
from epo_kernels.inputs.layout import Layout, as_layout, as_rows
from epo_kernels.inputs.loss import Aggregation, Coefficients, LossArguments, LossInputs, as_loss_inputs
from epo_kernels.inputs.tokens import LogitTransform, TokenInputs, as_token_inputs, as_transform

__all__ = [
    "Aggregation",
    "Chunking",
    "Coefficients",
    "Layout",
    "LogitTransform",
    "LossArguments",
    "LossInputs",
    "Projection",
    "Scalar",
    "TokenBatch",
    "TokenInputs",
    "as_chunking",
    "as_integer",
    "as_layout",
    "as_loss_inputs",
    "as_projection",
    "as_rows",
    "as_scalar",
    "as_token_batch",
    "as_token_inputs",
    "as_transform",
    "check_precise",
    "check_tensor",
    "checks_values",
    "compute_dtype",
    "tracing",
    "without_autocast",
]
