"""The optimiser of policy and critic: a step's minibatches, the learning rate's course, and updates left out."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from epo_kernels.train.config import CriticConfig, OptimConfig
from epo_kernels.train.data import Sample
from epo_kernels.train.distributed import Ranks, split_like


def cosine_with_warmup(update: int, total: int, warmup_ratio: float, min_ratio: float) -> float:
    """Factor on the learning rate: linear to 1 over the first `warmup_ratio` of all updates, then cosine."""
    warmup = round(warmup_ratio * total)
    if update < warmup:
        return (update + 1) / warmup
    progress = min((update - warmup) / max(total - 1 - warmup, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class StepOptimizer:
    """AdamW through a run's training steps, each of several minibatches.

    Args:
        parameters: those to train.
        config: of AdamW, the schedule and clipping.
        passes: whose lr, epochs, minibatches and minibatch_size hold.
        steps: that the schedule spans; any after them have its last rate.
        ranks: whose gradients are added up.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        config: OptimConfig,
        passes: OptimConfig | CriticConfig,
        steps: int,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._config = config
        self._passes = passes
        self._steps = steps
        self._steps_done = 0
        split = [parameter for parameter in self._parameters if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in self._parameters if not isinstance(parameter, DTensor)]
        self._groups = [group for group in (whole, split) if group]  # no operation takes both kinds at once
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in self._groups],
            lr=passes.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self._norms: list[float] = []
        self._skipped = 0
        self.skipped_in_row = 0  # updates, from one training step into the next

    def minibatches(self, samples: Sequence[Sample], seed: tuple[int, ...]) -> Iterator[list[Sample]]:
        """All epochs' minibatches of a training step, in an order drawn with `seed`; `apply` belongs after each."""
        self._norms, self._skipped = [], 0
        passes = self._passes
        a_pass = math.ceil(len(samples) / passes.minibatch_size) if passes.minibatch_size else passes.minibatches
        a_pass = min(a_pass, len(samples))
        updates = a_pass * passes.epochs
        update = self._steps_done * updates
        for epoch in range(passes.epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(samples))
            for indices in np.array_split(order, a_pass):
                self._set_rate(update, self._steps * updates)
                yield [samples[i] for i in indices]
                update += 1
        self._steps_done += 1

    def apply(self, loss: Tensor) -> float:
        """Update by the gradients there are, unless they or the loss aren't finite. Drops them, returns their norm."""
        self._ranks.add_gradients(self._parameters)
        norm = self._clip()
        if math.isfinite(norm) and bool(loss.isfinite()):
            self._adamw.step()
            self._norms.append(norm)
            self.skipped_in_row = 0
        else:
            self._skipped += 1
            self.skipped_in_row += 1
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def metrics(self, group: str) -> dict[str, float]:
        """Of the last training step: {"`group`/lr", "`group`/skipped_updates", "`group`/grad_norm"}."""
        named = {f"{group}/lr": float(self._adamw.param_groups[0]["lr"]), f"{group}/skipped_updates": self._skipped}
        if self._norms:
            named[f"{group}/grad_norm"] = sum(self._norms) / len(self._norms)
        return named

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by the parameters' order: a run may go on with another number of ranks.

        All ranks call it; it is complete on the first.
        """
        return {
            "adamw": [self._ranks.gather_state(self._adamw.state[parameter]) for parameter in self._parameters],
            "steps_done": self._steps_done,
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for parameter, own in zip(self._parameters, state["adamw"], strict=True):
            self._adamw.state[parameter] = {
                name: split_like(value, parameter) if value.shape == parameter.shape else value.clone()
                for name, value in own.items()
            }
        self._steps_done = state["steps_done"]
        self.skipped_in_row = state["skipped_in_row"]

    def _clip(self) -> float:
        """Clip the gradients to `max_grad_norm`; returns the norm that they had."""
        norms = []
        for group in self._groups:
            norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group in self._groups:
            torch.nn.utils.clip_grads_with_norm_(group, self._config.max_grad_norm, total)
        return float(total)

    def _set_rate(self, update: int, total: int) -> None:
        factor = cosine_with_warmup(update, total, self._config.warmup_ratio, self._config.min_lr_ratio)
        for group in self._adamw.param_groups:
            group["lr"] = self._passes.lr * factor
