"""Eager PyTorch under autograd: runs anywhere, is the oracle of every other backend, and materialises everything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from epo_kernels import reference
from epo_kernels.config import EPOConfig
from epo_kernels.inputs import Coefficients, LogitTransform, Projection, TokenInputs


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ()  # any
    dtypes: tuple[torch.dtype, ...] = ()  # any

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
        return reference.epo_loss(logits, transform, inputs, coefficients, cfg)

    def log_probs_and_entropy(
        self, logits: Tensor, transform: LogitTransform, tokens: Tensor, mask: Tensor, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, entropies = reference.masked_log_probs_and_entropy(logits, transform, tokens, mask)
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
        logits = project(projection, inputs.mask)
        return reference.epo_loss(logits, transform, inputs, coefficients, cfg)

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
        return self.log_probs_and_entropy(project(projection, mask), transform, tokens, mask, entropy=entropy)


def project(projection: Projection, mask: Tensor) -> Tensor:
    """The whole logits (B, T, V) in `logits_dtype`; hidden states of masked tokens are taken as 0, and never read."""
    # Values of the products' dtype, multiplied and added up in that of the logits.
    narrow, wide = projection.product_dtype, projection.logits_dtype
    hidden = torch.where(mask[..., None], projection.hidden, 0.0).to(narrow).to(wide)
    weight = projection.weight.to(narrow).to(wide)
    bias = None if projection.bias is None else projection.bias.to(wide)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, weight, bias)
