"""A model's forward that hands its last hidden states and its head to a loss, so that logits never exist."""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from epo_kernels.heads import Head, head_of

LossHead = Callable[[Tensor, Head], Any]


def add_loss_head(model: PreTrainedModel, score: Callable[..., FusedCausalLMOutput]) -> None:
    """Let `model(..., loss_head=f)` return f(last hidden states, head), and not project by itself.

    Beside it come the router's logits of a mixture of experts, or None. All within the model's own forward, because
    wrappers (DDP, FSDP, PEFT, autocast) do their work around it. `score` answers TRL's `model(..., labels=labels,
    fused_lm_head=True)`, so that old and reference log-probs are of the same head as the loss; TRL's own fused head
    knows fewer transforms.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: Any, *args: Any, loss_head: LossHead | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if loss_head is None and not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels", None)  # PEFT hands them on
        outputs, head = self.base_model(*args, **{**kwargs, "use_cache": False}), head_of(self)
        hidden = outputs.last_hidden_state.to(head.weight.device)
        if loss_head is None:
            return score(hidden, head, labels=labels.to(head.weight.device))
        return loss_head(hidden, head), getattr(outputs, "router_logits", None)

    model.forward = types.MethodType(forward, model)
