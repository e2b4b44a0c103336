"""The entropy history: what each turn's entropy has been, and the band that follows from it."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from epo_kernels.inputs import as_integer

HistoryScope = Literal["turn", "global"]
HistoryWeighting = Literal["token", "step"]

_GRID = 2.0**32  # to the nat


class EntropyHistory:
    """Mean entropy H̄ of each turn over the committed training steps, and its band (κ_l H̄, κ_r H̄).

    A training step adds the entropies of its micro-batches with `update` and closes with `commit`; `bounds` knows
    committed steps alone, so every micro-batch and epoch of a step sees the same band.

    Entropies are taken to the nearest 2^-32 nat, so that float64 adds them up without rounding (to 2 million nats a
    turn and step): however a step's tokens are spread over micro-batches and ranks, and in whatever order they come,
    H̄ is the same to the last bit.

    Args:
        num_turns: number of turns told apart, at least 1; turns are numbered from 0.
        window: how many committed steps count, the latest ones; None for all.
        scope: "turn" keeps a mean for each turn, "global" one for all of them.
        weighting: "token": every counted token weighs the same over the window. "step": every step's mean weighs the
            same (the paper's cumulative H̄), steps in which a turn never came up aside.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        num_turns: int,
        window: int | None = None,
        scope: HistoryScope = "turn",
        weighting: HistoryWeighting = "token",
    ) -> None:
        num_turns = as_integer("num_turns", num_turns, 1)
        if window is not None:
            window = as_integer("window", window, 1, meaning=" step, or None")
        if scope not in get_args(HistoryScope):
            raise ValueError(f"scope must be one of {', '.join(get_args(HistoryScope))}, got {scope!r}")
        if weighting not in get_args(HistoryWeighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(HistoryWeighting))}, got {weighting!r}")
        self.num_turns = num_turns
        self.window = window
        self.scope = scope
        self.weighting = weighting
        # Per turn, value and weight whose quotient is H̄. float64 and on the CPU: small, exact enough to add for ever.
        self._total = torch.zeros(2, num_turns, dtype=torch.float64, device="cpu")
        self._steps: list[Tensor] = []  # the committed steps of the window, each (2, num_turns)
        self._num_steps = 0
        self._open: Tensor | None = None  # (2, num_turns + 1) on the device of the entropies; last: out of range

    def __len__(self) -> int:
        """Number of committed steps so far, those that left the window included."""
        return self._num_steps

    def update(self, turns: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """Add tokens to the open step. No sync, and `bounds` doesn't move.

        Args:
            turns: integer turn of each token, in [0, num_turns) where the mask is 1.
            entropy: like turns, float; detached here. Never read where the mask is 0.
            mask: like turns, bool or 0/1.

        Raises:
            ValueError: shapes differ. Turns out of range raise at `commit`, where their number is known for free.
            TypeError: turns aren't integers.
        """
        _check_integers(turns)
        if turns.shape != entropy.shape or mask.shape != entropy.shape:
            raise ValueError(
                "turns, entropy and mask must have one shape, got "
                f"{tuple(turns.shape)}, {tuple(entropy.shape)} and {tuple(mask.shape)}"
            )
        counted = mask.reshape(-1) != 0
        index = turns.reshape(-1).to(torch.int64)
        in_range = (index >= 0) & (index < self.num_turns)
        index = torch.where(counted & in_range, index, torch.full_like(index, self.num_turns))
        value = torch.where(counted, entropy.detach().reshape(-1).double(), 0.0)
        value = (value * _GRID).round() / _GRID
        step = torch.zeros(2, self.num_turns + 1, dtype=torch.float64, device=entropy.device)
        step[0].index_add_(0, index, value)
        step[1].index_add_(0, index, counted.double())
        self._open = step if self._open is None else self._open.to(step.device) + step

    def commit(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Close the open step; from here on `bounds` knows it. Syncs once. A step without tokens counts in the window.

        Args:
            group: the ranks whose tokens make the step together (their sums are all-reduced), such as
                torch.distributed.group.WORLD; None: this process alone, with a warning where it has company.

        Raises:
            ValueError: a counted token had a turn out of [0, num_turns) or an entropy that isn't finite. The open step
                is dropped, the history unchanged.
        """
        step, self._open = self._open, None
        if step is None:
            step = torch.zeros(2, self.num_turns + 1, dtype=torch.float64, device="cpu")
        if group is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            warnings.warn(
                "EntropyHistory.commit without a group closes this rank's step alone, and each rank gets a band of its "
                "own; pass group=torch.distributed.group.WORLD for one of all ranks",
                stacklevel=2,
            )
        if group is not None:
            # A rank without tokens holds zeros on the CPU, where NCCL doesn't reach.
            step = step.to("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")
            torch.distributed.all_reduce(step, group=group)
        step = step.cpu()
        if step[1, -1] > 0:
            raise ValueError(
                f"turns must be in [0, {self.num_turns}) where the mask is 1; {int(step[1, -1])} tokens of this step "
                "had another. Build the history with a larger num_turns. The step was dropped."
            )
        if not bool(torch.isfinite(step).all()):
            raise ValueError("entropy must be finite where the mask is 1; this step held NaN or inf and was dropped")
        step = step[:, :-1]
        if self.scope == "global":
            step = step.sum(dim=1, keepdim=True).expand(2, self.num_turns).clone()
        if self.weighting == "step":
            step = torch.stack([_quotient(step, unknown=0.0), (step[1] > 0).double()])
        self._num_steps += 1
        if self.window is None:
            self._total = self._total + step
        else:
            self._steps = [*self._steps, step][-self.window :]
            # Added up anew, so that nothing is left of a step that went out of the window.
            self._total = torch.stack(self._steps).sum(dim=0)

    def means(self) -> Tensor:
        """H̄ of each turn in nats, float64 (num_turns,); NaN for a turn that was never seen."""
        return _quotient(self._total, unknown=float("nan"))

    def bounds(self, turns: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The band of each token, (lower, upper), float32 on the device of `turns` and shaped like it.

        Args:
            turns: integer turns. One that was never seen, or lies out of [0, num_turns) as padding does, has the band
                (-inf, +inf).
            low: κ_l, at least 0: lower = κ_l H̄.
            high: κ_r, at least low; may be infinite: upper = κ_r H̄.

        Raises:
            ValueError: low and high out of order.
            TypeError: turns aren't integers.
        """
        _check_integers(turns)
        if not 0.0 <= low <= high or low == float("inf"):
            raise ValueError(f"low and high must satisfy 0 <= low <= high with low finite, got {low} and {high}")
        mean = self.means()
        known = ~torch.isnan(mean)
        # A last row for turns that aren't known; inf is filled in, never multiplied (0 * inf is NaN).
        lower = torch.full((self.num_turns + 1,), float("-inf"), dtype=torch.float32, device="cpu")
        upper = torch.full((self.num_turns + 1,), float("inf"), dtype=torch.float32, device="cpu")
        lower[:-1][known] = (low * mean[known]).float()
        if high != float("inf"):
            upper[:-1][known] = (high * mean[known]).float()
        index = turns.to(torch.int64)
        index = torch.where((index >= 0) & (index < self.num_turns), index, self.num_turns)
        return lower.to(turns.device)[index], upper.to(turns.device)[index]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: the settings, and tensors that `torch.load(weights_only=True)` reads."""
        return {
            "num_turns": self.num_turns,
            "window": self.window,
            "scope": self.scope,
            "weighting": self.weighting,
            "num_steps": self._num_steps,
            "total": self._total.clone(),
            "steps": [step.clone() for step in self._steps],
            "open": None if self._open is None else self._open.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: the state was made with other settings; the message names them.
        """
        for name in ("num_turns", "window", "scope", "weighting"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved history has {name}={state[name]!r}, this one {getattr(self, name)!r}; "
                    "build it with the saved settings"
                )
        self._num_steps = int(state["num_steps"])
        self._total = state["total"].to("cpu", copy=True)
        self._steps = [step.to("cpu", copy=True) for step in state["steps"]]
        self._open = None if state["open"] is None else state["open"].clone()


def _check_integers(turns: Tensor) -> None:
    if turns.is_floating_point() or turns.dtype == torch.bool:
        raise TypeError(f"turns must be integers, got {turns.dtype}")


def _quotient(sums: Tensor, unknown: float) -> Tensor:
    """sums[0] / sums[1], `unknown` where sums[1] is 0."""
    seen = sums[1] > 0
    return torch.where(seen, sums[0] / torch.where(seen, sums[1], 1.0), unknown)
