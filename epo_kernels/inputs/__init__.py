"""The one place that checks arguments, and the records in which everything behind it sees them.

Padded (B, T) and packed (N,) batches come out alike: a packed batch is one row, (1, N), with `sequence_ids`. Canonical
arguments (float32, int64, bool) are only viewed here, never copied, so that a fused backend launches nothing but its
own kernels.

Checks of shapes, types and devices always run. Checks of values run where they are free: on CPU tensors, but not under
`torch.compile`, FakeTensorMode or a `torch.func` transform; on CUDA with EPO_KERNELS_CHECK=1, at the price of a sync.
Where they don't run, a bad value makes the loss NaN and is counted in `metrics.invalid_tokens`.
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
