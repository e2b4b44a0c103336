"""Eager PyTorch under autograd: runs anywhere, is the oracle of every other backend, and materialises everything."""

from __future__ import annotations

from torch import Tensor

from epo_kernels import reference
from epo_kernels.config import EPOConfig
from epo_kernels.inputs import Coefficients, LogitTransform, TokenInputs


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ()  # any

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
