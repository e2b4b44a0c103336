"""The phase weight β of the band penalty over the course of training."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "paper", "official")
PAPER_GAMMA = 3.0


def phase_weight(step: int, total_steps: int, schedule: str = "paper") -> float:
    """β at a training step, for `epo_loss(..., penalty_weight=)`.

    - "constant": 1.
    - "paper": 1 + exp(-γ step / ⌊K/2⌋) with γ = 3 (arXiv 2509.22576, second version): from 2 down to 1.
    - "official": the published code. 1 down to 0.827 over the first half, then 0.8 down to 0.04.

    Args:
        step: training step, from 0. Steps past `total_steps` continue the formula.
        total_steps: K, the length of the training, at least 1.
        schedule: one of the names above.

    Raises:
        ValueError: step is negative, total_steps is below 1, or schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if schedule == "constant":
        return 1.0
    half = total_steps // 2
    if schedule == "paper":
        return 1.0 + math.exp(-PAPER_GAMMA * step / max(half, 1))
    if step <= half:
        return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * step / max(half, 1)))
    return 0.8 * math.exp(-3.0 * (step - half) / (total_steps - half))
