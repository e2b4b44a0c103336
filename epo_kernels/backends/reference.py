"""Eager PyTorch under autograd: runs anywhere, is the oracle of every other backend, and materialises everything."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from epo_kernels import reference
from epo_kernels.autograd import refuse_transforms
from epo_kernels.config import EPOConfig
from epo_kernels.fused.sharded import GatheredColumns, ReplicatedInput, Shard
from epo_kernels.inputs import Coefficients, LogitTransform, Projection, TokenInputs, without_autocast


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

    def epo_loss(
        self,
        logits: Tensor,
        transform: LogitTransform,
        inputs: TokenInputs,
        coefficients: Coefficients,
        cfg: EPOConfig,
        *,
        inplace: bool,
    ) -> reference.EPOOutput:
        # inplace is a permission, and autograd has no use for it.
        return reference.epo_loss(self._whole(logits), transform, inputs, coefficients, cfg)

    def log_probs_and_entropy(
        self, logits: Tensor, transform: LogitTransform, tokens: Tensor, mask: Tensor, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropies = reference.masked_log_probs_and_entropy(self._whole(logits), transform, tokens, mask)
        return log_probs, entropies if entropy else None

    def linear_epo_loss(
        self,
        projection: Projection,
        transform: LogitTransform,
        inputs: TokenInputs,
        coefficients: Coefficients,
        cfg: EPOConfig,
        *,
        num_active: int | None,
        max_chunk_bytes: int,
    ) -> reference.EPOOutput:
        # Neither chunks nor dropped rows: the whole logits, as the other ways to compute them are tested against.
        logits = self._project(projection, transform, inputs.mask)
        return self.epo_loss(logits, transform, inputs, coefficients, cfg, inplace=False)

    def linear_log_probs_and_entropy(
        self,
        projection: Projection,
        transform: LogitTransform,
        tokens: Tensor,
        mask: Tensor,
        *,
        entropy: bool,
        num_active: int | None,
        max_chunk_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        return self.log_probs_and_entropy(
            self._project(projection, transform, mask), transform, tokens, mask, entropy=entropy
        )

    def _whole(self, logits: Tensor) -> Tensor:
        if self._shard is None:
            return logits
        refuse_transforms(logits)
        return GatheredColumns.apply(logits, self._shard)[0]

    def _project(self, projection: Projection, transform: LogitTransform, mask: Tensor) -> Tensor:
        if self._shard is None:
            return project(projection, mask, transform.vocab_size)
        refuse_transforms(projection.hidden, projection.weight, projection.bias)
        projection = replace(projection, hidden=ReplicatedInput.apply(projection.hidden, self._shard)[0])
        logits = project(projection, mask, self._shard.own_vocabulary(transform.vocab_size))
        return F.pad(logits, (0, projection.weight.shape[0] - logits.shape[-1]))


def project(projection: Projection, mask: Tensor, vocab_size: int) -> Tensor:
    """The logits (B, T, vocab_size) in `logits_dtype`. Neither hidden states of masked tokens nor rows of the head past
    the vocabulary are read."""
    # Values of the products' dtype, multiplied and added up in that of the logits.
    narrow, wide = projection.product_dtype, projection.logits_dtype
    hidden = torch.where(mask[..., None], projection.hidden, 0.0).to(narrow).to(wide)
    weight = projection.weight[:vocab_size].to(narrow).to(wide)
    bias = None if projection.bias is None else projection.bias[:vocab_size].to(wide)
    with without_autocast(hidden.device):
        return F.linear(hidden, weight, bias)
