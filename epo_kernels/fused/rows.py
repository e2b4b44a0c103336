"""The interface of a fused backend's kernels: four modes over rows of logits, with only numbers and tensors.

Kernels know no config object, aggregation mode or history. The caller (`ops.py`, `backend.py`) handles autograd, token
weights and the choice of mode, in the same way for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from epo_kernels.declaration import KLType, Penalty, RowPolicyLoss
from epo_kernels.inputs import Aggregation, LogitTransform, Scalar, TokenInputs

OUTSIDE = -1  # a token id outside every vocabulary


@dataclass(frozen=True)
class Rows:
    """Rows of logits and their tokens.

    Attributes:
        logits: (B, T, V) bfloat16, float16 or float32, any strides (also of V).
        tokens: (B, T) int64, any strides. A counted token outside [0, transform.vocab_size) is invalid: its log-prob,
            its loss and the gradient of its row are NaN, and it is counted.
        mask: (B, T) bool, any strides. Where it is False nothing may be read, and results and gradient are 0.
        transform: how raw logits become z; its temperature is a number, a 0-d tensor or (B, T) float32, any strides.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    transform: LogitTransform

    @classmethod
    def of(cls, logits: Tensor, inputs: TokenInputs) -> Rows:
        """The rows of logits (B, T, V) with these tokens."""
        return cls(logits, kernel_tokens(inputs), inputs.mask, inputs.transform)


def kernel_tokens(inputs: TokenInputs) -> Tensor:
    """Tokens (B, T) for the kernels: invalid tokens get an id outside every vocabulary."""
    return inputs.tokens if inputs.invalid is None else inputs.tokens.masked_fill(inputs.invalid, OUTSIDE)


@dataclass(frozen=True)
class Terms:
    """The per-token arguments of the loss: (B, T) float32 of any strides (expanded ones have stride 0), or None.

    Attributes:
        weights: contiguous; 0 where the mask is 0.
        old_log_probs: None: on-policy, ratio 1 with its gradient.
        lower, upper: the band of each token; None: no band. A counted token without lower <= upper is invalid: its loss
            and the gradient of its row are NaN, and it is counted.
        coefficients: (len(COEFFICIENTS),) float32 on the device of the logits.
        ticket: (1,) int32 on that device, initially 0, used by kernels to count finished blocks; a launch resets it to
            0.
        policy_loss, penalty, kl_type: as in EPOConfig.
    """

    weights: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    coefficients: Tensor
    ticket: Tensor
    policy_loss: RowPolicyLoss
    penalty: Penalty
    kl_type: KLType

    def map(self, function: Callable[[Tensor], Tensor]) -> Terms:
        """A copy with function applied to every per-token argument that is not None."""
        names = ("weights", "advantages", "old_log_probs", "ref_log_probs", "is_weights", "lower", "upper")
        changed: dict[str, Any] = {
            name: function(value) for name in names if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed)


class Prepared(NamedTuple):
    """Precomputed inputs of a loss launch; the first three go into `Terms`.

    extras: (2,) float64, the metrics that rows cannot provide: the number of sequences with a counted token, and 0 for
    "recomputed_tokens".
    """

    weights: Tensor
    coefficients: Tensor
    ticket: Tensor
    extras: Tensor


class RowStatistics(NamedTuple):
    """(B, T) float32, contiguous; log_probs and entropy are 0 where the mask is 0.

    z = maximum_scale y (`StatisticsKernels.maximum_scale`). maximum is that of y, before any rounding. sum is
    Σ e^(z - max z), stored instead of its logarithm, whose rounding error every p would share. A row that is entirely
    -inf has maximum -inf and sum 0; a row with NaN or +inf has sum NaN. entropy is None if not requested.
    """

    log_probs: Tensor
    entropy: Tensor | None
    maximum: Tensor
    sum: Tensor


class Spread(NamedTuple):
    """variance: Σ p (log p + H)², collision: Σ p². (B, T) float32, contiguous; 0 where the mask is 0."""

    variance: Tensor
    collision: Tensor


class RowLoss(NamedTuple):
    """log_probs, entropy: (B, T) float32, contiguous; 0 where the mask is 0.

    sums: (len(ROW_SUMS),) float64, added in a fixed order. loss: the "loss" entry of sums, 0-d float32.
    """

    log_probs: Tensor
    entropy: Tensor
    sums: Tensor
    loss: Tensor


class StatisticsKernels(Protocol):
    """Row statistics and their gradient. Nothing syncs; empty batches are allowed.

    `out` is (B, T, V) of the logits' dtype, any strides; it may be `rows.logits` itself.
    """

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        """Statistics alone: one read of the logits."""

    def spread(self, rows: Rows, statistics: RowStatistics) -> Spread:
        """Moments about the entropy: one more read of the logits.

        statistics: of the rows, or of longer rows of which these are a part, with entropy; then the sums are a part.
        """

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """Gradient of the raw logits for given upstream gradients (B, T) float32, contiguous.

        statistics: of the rows, or of longer rows of which these are a part; the token may then be outside their
        columns. A row whose log-prob is NaN, such as an invalid token's, gets a NaN gradient.
        grad_entropy: None if no gradient flows to the entropy; only then may `statistics.entropy` be None. Writes every
        element of out: 0 in masked rows and past vocab_size.
        """

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        """Factor from the units of `RowStatistics.maximum` to the units of z; (B, T) if the temperature is (B, T)."""

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        """out = gradient (B, T, V) times factor, multiplied in float32 and rounded once; factor is 0-d on its device.

        out: the gradient itself, which is not touched if the factor is 1; or memory of its own for the same sizes, of
        the same dtype or, for a float32 gradient, a narrower one.
        """


class RowKernels(StatisticsKernels, Protocol):
    """All four modes, and the preparation of a loss."""

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        """Token-scope loss; writes ∂loss/∂logits to out, every element, unless out is None."""

    def prepare(self, mask: Tensor, aggregation: Aggregation, coefficients: tuple[Scalar, ...]) -> Prepared:
        """Weights for a mask (B, T), and coefficients in the order of COEFFICIENTS, on the device.

        In plain PyTorch: `fused.backend.PlainHelpers`.
        """
