"""The optimizer of policy and critic: a step's minibatches, the learning rate's schedule, and skipped updates."""

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
    """The factor on the learning rate by update: linear to 1 over the warm-up, then cosine to `min_ratio`.

    Args:
        updates: how many the schedule spans; later ones keep the last rate.
        warmup_ratio: share of them that is warm-up.
        min_ratio: the last update's factor; a schedule of one update has factor 1.
    """
    warmup = round(warmup_ratio * updates)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        torch.optim.SGD([torch.zeros(())]),  # the formula alone is used: updates a step, and so `updates`, may vary
        num_warmup_steps=warmup,
        num_training_steps=updates - 1,  # the last update, not the one after it, has the minimum
        min_lr_rate=min_ratio,
    )
    (factor,) = schedule.lr_lambdas
    # The library's warm-up begins at 0, which would waste an update.
    return lambda update: factor(update + 1 if update < warmup else max(min(update, updates - 1), warmup))


@dataclass
class StepOptimizer:
    """AdamW through a run's training steps, each of several minibatches."""

    model: nn.Module
    config: OptimConfig
    passes: OptimConfig | CriticConfig  # whose lr, epochs, minibatches and minibatch_size hold
    steps: int  # that the schedule spans; any after them have its last rate
    ranks: Ranks
    skipped_in_row: int = field(default=0, init=False)  # updates, from one training step into the next

    def __post_init__(self) -> None:
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        split = [parameter for parameter in self._parameters if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in self._parameters if not isinstance(parameter, DTensor)]
        self._groups = [group for group in (whole, split) if group]  # no operation takes both kinds at once
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in self._groups],
            lr=self.passes.lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
        )
        self._steps_done = 0
        self._norms: list[float] = []
        self._skipped = 0

    def minibatches(self, samples: Sequence[Sample], seed: tuple[int, ...]) -> Iterator[list[Sample]]:
        """All epochs' minibatches of a training step, in an order drawn with `seed`; `apply` belongs after each."""
        self._norms, self._skipped = [], 0
        passes = self.passes
        a_pass = math.ceil(len(samples) / passes.minibatch_size) if passes.minibatch_size else passes.minibatches
        a_pass = min(a_pass, len(samples))
        updates = a_pass * passes.epochs
        update = self._steps_done * updates
        factor = cosine_with_warmup(self.steps * updates, self.config.warmup_ratio, self.config.min_lr_ratio)
        for epoch in range(passes.epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(samples))
            for indices in np.array_split(order, a_pass):
                for group in self._adamw.param_groups:
                    group["lr"] = passes.lr * factor(update)
                yield [samples[i] for i in indices]
                update += 1
        self._steps_done += 1

    def apply(self, loss: Tensor) -> float:
        """Update by the gradients there are, unless they or the loss aren't finite. Drops them, returns their norm."""
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
        """Of the last training step: {"`group`/lr", "`group`/skipped_updates", "`group`/grad_norm"}."""
        named = {f"{group}/lr": float(self._adamw.param_groups[0]["lr"]), f"{group}/skipped_updates": self._skipped}
        if self._norms:
            named[f"{group}/grad_norm"] = sum(self._norms) / len(self._norms)
        return named

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments by parameter name, unsharded on the CPU: a run may continue on another number of ranks.

        All ranks call it; it is complete on the first. Settings such as betas are the configuration's, so they are not
        part of it.
        """
        adamw: dict[str, Any] = {}
        if self._adamw.state:  # else torch would make a first update of its own, to have moments
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            adamw |= get_optimizer_state_dict(self.model, self._adamw, options=options)
        return {"adamw": adamw.get("state", {}), "steps_done": self._steps_done, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["adamw"]:
            groups = get_optimizer_state_dict(self.model, self._adamw)["param_groups"]
            set_optimizer_state_dict(
                self.model,
                self._adamw,
                {"state": state["adamw"], "param_groups": groups},
                options=StateDictOptions(full_state_dict=True),
            )
            for moments in self._adamw.state.values():  # whole ones still lie in the checkpoint's file
                moments.update({name: v.clone() for name, v in moments.items() if not isinstance(v, DTensor)})
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
            torch.nn.utils.clip_grads_with_norm_(group, self.config.max_grad_norm, total)
        return float(total)
