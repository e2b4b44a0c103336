"""The optimizer of policy and critic: minibatches, learning-rate schedule, and skipped updates."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from epo_kernels.train.config import CriticConfig, OptimConfig
from epo_kernels.train.data import Sample
from epo_kernels.train.distributed import Ranks


def cosine_with_warmup(updates: int, warmup_ratio: float, min_ratio: float) -> Callable[[int], float]:
    """The learning-rate factor per update: linear warm-up to 1, then cosine decay to `min_ratio`.

    Args:
        updates: number of updates in the schedule; later ones keep the last rate.
        warmup_ratio: share of updates used for warm-up.
        min_ratio: factor of the last update; a schedule of one update has factor 1.
    """
    warmup = round(warmup_ratio * updates)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        torch.optim.SGD([torch.zeros(())]),  # only the formula is used, because `updates` may vary between steps
        num_warmup_steps=warmup,
        num_training_steps=updates - 1,  # so that the last update has the minimum, not the one after it
        min_lr_rate=min_ratio,
    )
    (factor,) = schedule.lr_lambdas
    # The library's warm-up starts at 0, which would waste an update.
    return lambda update: factor(update + 1 if update < warmup else max(min(update, updates - 1), warmup))


@dataclass
class StepOptimizer:
    """AdamW through a run's training steps, each of several minibatches."""

    model: nn.Module
    config: OptimConfig
    passes: OptimConfig | CriticConfig  # provides lr, epochs, minibatches and minibatch_size
    steps: int  # steps in the schedule; later steps keep its last rate
    ranks: Ranks
    skipped_in_row: int = field(default=0, init=False)  # consecutive skipped updates, across training steps
    steps_done: int = field(default=0, init=False)  # calls of `minibatches`

    def __post_init__(self) -> None:
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        split = [parameter for parameter in self._parameters if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in self._parameters if not isinstance(parameter, DTensor)]
        self._groups = [group for group in (whole, split) if group]  # fused operations cannot mix the two kinds
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in self._groups],
            lr=self.passes.lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
            fused=True,  # one pass over weights, gradients and moments, without temporary copies
        )
        self._norms: list[float] = []
        self._skipped = 0

    def minibatches(self, samples: Sequence[Sample], seed: tuple[int, ...]) -> Iterator[list[Sample]]:
        """The minibatches of all epochs of a step, shuffled with `seed`; call `apply` after each."""
        self._norms, self._skipped = [], 0
        passes = self.passes
        a_pass = math.ceil(len(samples) / passes.minibatch_size) if passes.minibatch_size else passes.minibatches
        a_pass = min(a_pass, len(samples))
        updates = a_pass * passes.epochs
        update = self.steps_done * updates
        factor = cosine_with_warmup(self.steps * updates, self.config.warmup_ratio, self.config.min_lr_ratio)
        for epoch in range(passes.epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(samples))
            for indices in np.array_split(order, a_pass):
                for group in self._adamw.param_groups:
                    group["lr"] = passes.lr * factor(update)
                yield [samples[i] for i in indices]
                update += 1
        self.steps_done += 1

    def apply(self, loss: Tensor) -> float:
        """Update with the current gradients, unless they or the loss are not finite; clears them, returns the norm."""
        self.ranks.add_gradients(self._parameters)
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
        """Metrics of the last training step: {"`group`/lr", "`group`/skipped_updates", "`group`/grad_norm"}."""
        named = {f"{group}/lr": float(self._adamw.param_groups[0]["lr"]), f"{group}/skipped_updates": self._skipped}
        if self._norms:
            named[f"{group}/grad_norm"] = sum(self._norms) / len(self._norms)
        return named

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments by parameter name, unsharded on the CPU, so a run may continue with another number of ranks.

        All ranks must call it; it is complete on the first. Settings such as betas come from the configuration and are
        not included.
        """
        adamw: dict[str, Any] = {}
        if self._adamw.state:  # otherwise torch would perform an update of its own to create the moments
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            adamw |= get_optimizer_state_dict(self.model, self._adamw, options=options)
        return {"adamw": adamw.get("state", {}), "steps_done": self.steps_done, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["adamw"]:
            groups = get_optimizer_state_dict(self.model, self._adamw)["param_groups"]
            set_optimizer_state_dict(
                self.model,
                self._adamw,
                {"state": state["adamw"], "param_groups": groups},
                options=StateDictOptions(full_state_dict=True),
            )
            for moments in self._adamw.state.values():  # unsharded ones are still mapped from the checkpoint's file
                moments.update({name: v.clone() for name, v in moments.items() if not isinstance(v, DTensor)})
        self.steps_done = state["steps_done"]
        self.skipped_in_row = state["skipped_in_row"]

    def _clip(self) -> float:
        """Clip the gradients to `max_grad_norm`; returns their norm before clipping."""
        norms = []
        for group in self._groups:
            norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group in self._groups:
            torch.nn.utils.clip_grads_with_norm_(group, self.config.max_grad_norm, total)
        return float(total)
