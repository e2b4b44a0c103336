"""Eager PyTorch with autograd: runs anywhere, is the oracle of every other backend, and materialises everything."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from epo_kernels import reference
from epo_kernels.autograd import refuse_transforms
from epo_kernels.inputs import Chunking, LossInputs, Projection, TokenInputs, without_autocast
from epo_kernels.shard import GatheredColumns, ReplicatedInput, Shard


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ()  # any
    dtypes: tuple[torch.dtype, ...] = ()  # any

    def __init__(self, shard: Shard | None = None) -> None:
        self._shard = shard

    def sharded(self, shard: Shard) -> ReferenceBackend:
        return ReferenceBackend(shard)

    def why_unavailable(self) -> str | None:
        return None

    def epo_loss(self, logits: Tensor, inputs: LossInputs, *, inplace: bool) -> reference.EPOOutput:
        # inplace is only a permission; autograd cannot use it.
        return reference.epo_loss(self._whole(logits), inputs)

    def log_probs_and_entropy(
        self, logits: Tensor, inputs: TokenInputs, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropies = reference.masked_log_probs_and_entropy(self._whole(logits), inputs)
        return log_probs, entropies if entropy else None

    def distribution_statistics(self, logits: Tensor, inputs: TokenInputs) -> reference.DistributionStatistics:
        return reference.distribution_statistics(self._whole(logits), inputs)

    def linear_distribution_statistics(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking
    ) -> reference.DistributionStatistics:
        return self.distribution_statistics(self._project(projection, inputs), inputs)

    def linear_epo_loss(self, projection: Projection, inputs: LossInputs, chunking: Chunking) -> reference.EPOOutput:
        # Neither chunks nor dropped rows: the other paths are tested against the whole logits.
        return self.epo_loss(self._project(projection, inputs), inputs, inplace=False)

    def linear_log_probs_and_entropy(
        self, projection: Projection, inputs: TokenInputs, chunking: Chunking, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.log_probs_and_entropy(self._project(projection, inputs), inputs, entropy=entropy)

    def _whole(self, logits: Tensor) -> Tensor:
        if self._shard is None:
            return logits
        refuse_transforms(logits)
        return GatheredColumns.apply(logits, self._shard)[0]

    def _project(self, projection: Projection, inputs: TokenInputs) -> Tensor:
        vocab_size = inputs.transform.vocab_size
        if self._shard is None:
            return project(projection, inputs.mask, vocab_size)
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        projection = replace(projection, hidden=ReplicatedInput.apply(projection.hidden, self._shard)[0])
        logits = project(projection, inputs.mask, self._shard.own_vocabulary(vocab_size))
        return F.pad(logits, (0, projection.weight.shape[0] - logits.shape[-1]))


def project(projection: Projection, mask: Tensor, vocab_size: int) -> Tensor:
    """The logits (B, T, vocab_size) in `logits_dtype`. Hidden states of masked tokens and rows of the head past the
    vocabulary are not read."""
    # Operands are rounded to the products' dtype, then multiplied and accumulated in the logits' dtype.
    narrow, wide = projection.product_dtype, projection.logits_dtype
    hidden = torch.where(mask[..., None], projection.hidden, 0.0).to(narrow).to(wide)
    weight = projection.weight[:vocab_size].to(narrow).to(wide)
    bias = None if projection.bias is None else projection.bias[:vocab_size].to(wide)
    with without_autocast(hidden.device):
        return F.linear(hidden, weight, bias)
