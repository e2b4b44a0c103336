"""`nn.Module` wrappers of the losses, for trainers that keep their loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from epo_kernels.config import EPOConfig
from epo_kernels.functional import epo_loss, linear_epo_loss
from epo_kernels.reference import EPOOutput


class _Loss(nn.Module):
    def __init__(self, cfg: EPOConfig, **defaults: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.defaults = defaults

    def extra_repr(self) -> str:
        return ", ".join([repr(self.cfg), *(f"{name}={value!r}" for name, value in self.defaults.items())])


class EPOLoss(_Loss):
    """`epo_loss` with a fixed config.

    Args:
        cfg: see `EPOConfig`.
        defaults: keyword arguments of `epo_loss` shared by every call; a call may override them.
    """

    def forward(
        self,
        logits: Tensor,
        tokens: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        **kwargs: Any,
    ) -> EPOOutput:
        """See `epo_loss`."""
        return epo_loss(logits, tokens, old_log_probs, advantages, mask, self.cfg, **{**self.defaults, **kwargs})


class LinearEPOLoss(_Loss):
    """`linear_epo_loss` with a fixed config; the head's weight stays in the model and is passed to every call.

    Args:
        cfg: see `EPOConfig`.
        defaults: keyword arguments of `linear_epo_loss` shared by every call; a call may override them.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        **kwargs: Any,
    ) -> EPOOutput:
        """See `linear_epo_loss`."""
        kwargs = {**self.defaults, **kwargs}
        return linear_epo_loss(hidden, weight, tokens, old_log_probs, advantages, mask, self.cfg, **kwargs)
