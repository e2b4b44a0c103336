"""The entropy history: the mean entropy of each turn so far, and the band derived from it."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from epo_kernels.inputs import as_integer

HistoryScope = Literal["turn", "global"]
HistoryWeighting = Literal["token", "step"]

_GRID = 2.0**32  # steps per nat


class EntropyHistory:
    """Mean entropy H̄ of each turn over the committed training steps, and its band (κ_l H̄, κ_r H̄).

    A training step adds the entropies of its micro-batches with `update` and ends with `commit`. `bounds` uses
    committed steps only, so every micro-batch and epoch of a step sees the same band.

    Entropies are rounded to the nearest 2^-32 nat, so that float64 sums are exact (up to 2 million nats per turn and
    step). H̄ is therefore bit-identical however a step's tokens are distributed over micro-batches and ranks, in any
    order.

    Args:
        num_turns: number of distinct turns, at least 1; turns are numbered from 0.
        window: number of most recent committed steps to use; None for all.
        scope: "turn" keeps one mean per turn, "global" one mean for all turns.
        weighting: "token": every counted token in the window has the same weight. "step": every step's mean has the
            same weight (the paper's cumulative H̄), skipping steps in which a turn did not occur.

    Raises:
        ValueError: an argument is out of range.
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
        # Per turn, numerator and denominator of H̄. float64 on the CPU: small, and precise enough for long runs.
        self._total = torch.zeros(2, num_turns, dtype=torch.float64, device="cpu")
        self._steps: list[Tensor] = []  # the committed steps of the window, each (2, num_turns)
        self._num_steps = 0
        self._open: Tensor | None = None  # (2, num_turns + 1) on the entropies' device; last column: out of range

    def __len__(self) -> int:
        """Number of committed steps, including those that have left the window."""
        return self._num_steps

    def update(self, turns: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """Add tokens to the open step. Does not sync and does not change `bounds`.

        Args:
            turns: integer turn of each token, in [0, num_turns) where the mask is 1.
            entropy: like turns, float; detached here. Not read where the mask is 0.
            mask: like turns, bool or 0/1.

        Raises:
            ValueError: shapes differ. Turns out of range raise in `commit`, which syncs anyway.
            TypeError: turns are not integers.
        """
        _check_integers(turns)
        if turns.shape != entropy.shape or mask.shape != entropy.shape:
            raise ValueError(
                "turns, entropy and mask must have the same shape, got "
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
        """Close the open step and add it to `bounds`. Syncs once. A step without tokens counts towards the window.

        Args:
            group: the ranks that share the step (their sums are all-reduced), e.g. torch.distributed.group.WORLD.
                None: this process only, with a warning if there are other ranks.

        Raises:
            ValueError: a counted token had a turn outside [0, num_turns) or a non-finite entropy. The open step is
                dropped and the history stays unchanged.
        """
        step, self._open = self._open, None
        if step is None:
            step = torch.zeros(2, self.num_turns + 1, dtype=torch.float64, device="cpu")
        if group is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            warnings.warn(
                "EntropyHistory.commit without a group closes only this rank's step, so each rank gets its own band; "
                "pass group=torch.distributed.group.WORLD to share one across ranks",
                stacklevel=2,
            )
        if group is not None:
            # A rank without tokens has zeros on the CPU, which NCCL cannot reduce.
            step = step.to("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")
            torch.distributed.all_reduce(step, group=group)
        step = step.cpu()
        if step[1, -1] > 0:
            raise ValueError(
                f"turns must be in [0, {self.num_turns}) where the mask is 1; {int(step[1, -1])} tokens of this step "
                "were outside. Build the history with a larger num_turns. The step was dropped."
            )
        if not bool(torch.isfinite(step).all()):
            raise ValueError("entropy must be finite where the mask is 1; this step had NaN or inf and was dropped")
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
            # Summed from scratch, so that no rounding error remains from steps that left the window.
            self._total = torch.stack(self._steps).sum(dim=0)

    def means(self) -> Tensor:
        """H̄ of each turn in nats, float64 (num_turns,); NaN for a turn never seen."""
        return _quotient(self._total, unknown=float("nan"))

    def bounds(self, turns: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The band of each token, (lower, upper), float32 on the device of `turns` and shaped like it.

        Args:
            turns: integer turns. A turn never seen, or outside [0, num_turns) as in padding, has the band (-inf, +inf).
            low: κ_l, at least 0: lower = κ_l H̄.
            high: κ_r, at least low; may be infinite: upper = κ_r H̄.

        Raises:
            ValueError: low and high are out of order.
            TypeError: turns are not integers.
        """
        _check_integers(turns)
        if not 0.0 <= low <= high or low == float("inf"):
            raise ValueError(f"low and high must satisfy 0 <= low <= high with low finite, got {low} and {high}")
        mean = self.means()
        known = ~torch.isnan(mean)
        # An extra row for unknown turns; inf is filled in rather than multiplied, because 0 * inf is NaN.
        lower = torch.full((self.num_turns + 1,), float("-inf"), dtype=torch.float32, device="cpu")
        upper = torch.full((self.num_turns + 1,), float("inf"), dtype=torch.float32, device="cpu")
        lower[:-1][known] = (low * mean[known]).float()
        if high != float("inf"):
            upper[:-1][known] = (high * mean[known]).float()
        index = turns.to(torch.int64)
        index = torch.where((index >= 0) & (index < self.num_turns), index, self.num_turns)
        return lower.to(turns.device)[index], upper.to(turns.device)[index]

    def state_dict(self) -> dict[str, Any]:
        """Settings and tensors needed to resume, loadable with `torch.load(weights_only=True)`."""
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
        """Restore a saved state.

        Raises:
            ValueError: the state was saved with other settings; the message names them.
        """
        for name in ("num_turns", "window", "scope", "weighting"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{name} must match the saved history's {state[name]!r}, got {getattr(self, name)!r}; "
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
