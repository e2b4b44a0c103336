"""Learning curves of a run: success and entropy at every step, and statistics computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 5  # steps of a moving mean: one step of a few dozen episodes is noisy
TURNS_EVERY = 4  # the entropy by turn is kept for every fourth step, which halves the size of the results
COLLAPSE, RECOVERY = 0.5, 0.8  # relative to the best success so far
MIN_DROP = 0.05  # minimum loss of success in a collapse; smaller drops are noise


@dataclass(frozen=True)
class Curve:
    """One run: a record in the results' JSON."""

    arm: str
    seed: int
    success: list[float]  # of the training episodes, at each step
    entropy: list[float]  # nats per token
    turn_variance: list[float]  # of the entropy between the turns of a step
    entropy_by_turn: list[list[float | None]]  # at the first step and every TURNS_EVERY-th after it


def curve_of(arm: str, seed: int, lines: Sequence[Mapping[str, Any]]) -> Curve:
    """From the lines of metrics.jsonl."""
    by_turn = [line["epo/entropy_by_turn"] for line in lines]
    return Curve(
        arm=arm,
        seed=seed,
        success=[round(line["episode/success_rate"], 4) for line in lines],
        entropy=[round(line["actor/entropy"], 4) for line in lines],
        turn_variance=[round(_variance(turns), 6) for turns in by_turn],
        entropy_by_turn=[
            [None if value is None else round(value, 3) for value in turns] for turns in by_turn[::TURNS_EVERY]
        ],
    )


def read_curves(path: Path) -> list[Curve]:
    """Empty where the file does not exist."""
    return [Curve(**record) for record in json.loads(path.read_text())] if path.exists() else []


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over WINDOW consecutive values; the mean of all values if there are fewer."""
    width = min(WINDOW, len(values))
    return [float(np.mean(values[start : start + width])) for start in range(len(values) - width + 1)]


def has_collapsed(success: Sequence[float]) -> bool:
    """Whether smoothed success fell below half of its best so far, and by MIN_DROP or more, at any time."""
    return bool(_fallen(smoothed(success)).any())


def has_recovered(success: Sequence[float]) -> bool:
    """Whether a collapsed run ended at 80 % of the best success before its collapse, or above."""
    means = smoothed(success)
    fallen = np.flatnonzero(_fallen(means))
    return bool(len(fallen)) and means[-1] >= RECOVERY * max(means[: fallen[0]])


def ends_in_noise(entropy: Sequence[float]) -> bool:
    """Whether entropy ended above its start: a collapsed run of which this is False has settled into a habit."""
    means = smoothed(entropy)
    return means[-1] > means[0]


def late_variances(curve: Curve) -> tuple[float, float]:
    """(between steps, between turns) variance of the entropy over the second half of training."""
    half = len(curve.entropy) // 2
    return float(np.var(curve.entropy[half:])), float(np.mean(curve.turn_variance[half:]))


def _fallen(means: Sequence[float]) -> np.ndarray:
    """Boolean mask of the steps at which a run is in collapse."""
    best = np.maximum.accumulate(means)
    return (means < COLLAPSE * best) & (means <= best - MIN_DROP)


def _variance(turns: Sequence[float | None]) -> float:
    return float(np.var([value for value in turns if value is not None]))
