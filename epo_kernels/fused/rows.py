"""What a fused backend's kernels offer: three modes over the rows of logits, in numbers and tensors only.

They know no config object, no aggregation mode and no history. Autograd, the weights and the choice of the mode are
the caller's (`ops.py`, `backend.py`), the same for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from epo_kernels.declaration import KLType, Penalty, RowPolicyLoss
from epo_kernels.inputs import Aggregation, LogitTransform, Scalar, TokenInputs

OUTSIDE = -1  # a token of no vocabulary


@dataclass(frozen=True)
class Rows:
    """Rows of logits and what names their tokens.

    Attributes:
        logits: (B, T, V) bfloat16, float16 or float32, any strides (also of V).
        tokens: (B, T) int64, any strides; a counted token out of [0, transform.vocab_size) is invalid: its log-prob,
            and so its loss and the gradient of its row, are NaN, and it is counted.
        mask: (B, T) bool, any strides. Where it is False nothing may be read, results are 0 and the gradient is 0.
        transform: how raw logits become z; its temperature is a number, a 0-d tensor or (B, T) float32, any strides.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    transform: LogitTransform

    @classmethod
    def of(cls, logits: Tensor, inputs: TokenInputs) -> Rows:
        """The logits (B, T, V) of these tokens."""
        return cls(logits, kernel_tokens(inputs), inputs.mask, inputs.transform)


def kernel_tokens(inputs: TokenInputs) -> Tensor:
    """Tokens (B, T) as kernels take them: an invalid one is outside of every vocabulary."""
    return inputs.tokens if inputs.invalid is None else inputs.tokens.masked_fill(inputs.invalid, OUTSIDE)


@dataclass(frozen=True)
class Terms:
    """The per-token arguments of the loss: (B, T) float32 of any strides (expanded ones have stride 0), or None.

    Attributes:
        weights: contiguous; 0 where the mask is.
        old_log_probs: None: on-policy, ratio 1 with its gradient.
        lower, upper: the band of each token; None: no band. A counted token without lower <= upper is invalid: its loss
            and the gradient of its row are NaN, and it is counted.
        coefficients: (len(COEFFICIENTS),) float32 on the device of the logits.
        ticket: (1,) int32 on that device, holding 0, for kernels whose blocks count how many are done; a launch leaves
            it at 0.
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
        """The terms with function applied to every per-token argument that is there."""
        names = ("weights", "advantages", "old_log_probs", "ref_log_probs", "is_weights", "lower", "upper")
        changed: dict[str, Any] = {
            name: function(value) for name in names if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed)


class Prepared(NamedTuple):
    """What a loss launch needs beside its arguments; the first three go into `Terms`.

    extras: (2,) float64, the metrics that no row knows: the number of sequences with a counted token, and 0 for
    "recomputed_tokens".
    """

    weights: Tensor
    coefficients: Tensor
    ticket: Tensor
    extras: Tensor


class RowStatistics(NamedTuple):
    """(B, T) float32, contiguous; log_probs and entropy are 0 where the mask is 0.

    z = maximum_scale y (`StatisticsKernels.maximum_scale`): maximum is that of y, before anything is rounded, and sum
    is Σ e^(z - max z), kept and not its logarithm, whose rounding every p would share. A row wholly -inf has maximum
    -inf and sum 0; one with NaN or +inf has sum NaN.
    entropy is None where it wasn't asked for.
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

    sums: (len(ROW_SUMS),) float64, added in an order that never changes. loss: the one of them, 0-d float32.
    """

    log_probs: Tensor
    entropy: Tensor
    sums: Tensor
    loss: Tensor


class StatisticsKernels(Protocol):
    """Row statistics, their gradient, and what goes with them. Nothing syncs; batches of no tokens are allowed.

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

        statistics: those of the rows, or of longer rows that these are a part of; then a token may lie in none of their
        columns. A row whose log-prob is NaN, as an invalid token's is, has a gradient of NaN.
        grad_entropy None: none flows to the entropy, and only then may `statistics.entropy` be None. Writes every
        element of out: 0 in masked rows and past vocab_size.
        """

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        """Factor from the units of `RowStatistics.maximum` to those of z; (B, T) where the temperature is."""

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient (B, T, V) *= factor in float32, factor 0-d on its device; touches no memory where factor is 1."""


class RowKernels(StatisticsKernels, Protocol):
    """All three modes, and the preparation of a loss."""

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        """Token-scope loss; writes ∂loss/∂logits to out, every element, unless out is None."""

    def prepare(self, mask: Tensor, aggregation: Aggregation, coefficients: tuple[Scalar, ...]) -> Prepared:
        """Weights of a mask (B, T), and coefficients in the order of COEFFICIENTS, on the device.

        In plain PyTorch: `fused.backend.PlainHelpers`.
        """
