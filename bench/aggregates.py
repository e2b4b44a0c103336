"""Aggregate statistics over the seeds of a training experiment, after Agarwal et al. 2021 (arXiv 2108.13264).

The definitions match the package rliable, which is not used here: its last release (1.2.0) dates from 2024, and it
requires arch, pandas, scipy, seaborn and statsmodels for these few lines.

All scores are float64 arrays with one value per run. `Strata` maps a regime to the scores of its runs: resampling keeps
the number of runs of every regime, and draws seeds with replacement within it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Strata = Mapping[str, Sequence[float]]
Interval = tuple[float, float, float]  # value, low, high
Key = TypeVar("Key", bound=Hashable)


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the scores without the lowest and the highest quarter (each rounded down to whole scores).

    Raises:
        ValueError: no scores.
    """
    return float(_interquartile_mean(_flat(scores)))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Array:
    """(T,) share of runs whose score exceeds each threshold.

    Raises:
        ValueError: no scores.
    """
    return np.asarray((_flat(scores)[:, None] > np.asarray(thresholds)).mean(0), dtype=np.float64)


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> float:
    """P(a run of `first` scores higher than a run of `second`), ties counting one half (Mann and Whitney's U).

    Raises:
        ValueError: no scores.
    """
    return float(_improvement(_flat(first), _flat(second)))


def area_under_curve(values: ArrayLike) -> float:
    """Mean height of a learning curve with equally spaced points, by the trapezoidal rule.

    Raises:
        ValueError: no values.
    """
    heights = _flat(values)
    if len(heights) == 1:
        return float(heights[0])
    return float(((heights[1:] + heights[:-1]) / 2).mean())


def interquartile_mean_interval(strata: Strata, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Interquartile mean of the runs of all regimes, with its 95 % stratified bootstrap interval over seeds."""
    runs = {name: _flat(scores) for name, scores in strata.items()}
    return _interval(lambda part: _interquartile_mean(np.concatenate([*part.values()], -1)), runs, resamples, seed)


def improvement_interval(first: Strata, second: Strata, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean over regimes of `probability_of_improvement`, with its 95 % stratified bootstrap interval over seeds.

    Raises:
        ValueError: the regimes differ.
    """
    if first.keys() != second.keys():
        raise ValueError(f"both arms must have the same regimes, got {sorted(first)} and {sorted(second)}")
    runs = {("first", name): _flat(scores) for name, scores in first.items()}
    runs |= {("second", name): _flat(scores) for name, scores in second.items()}

    def statistic(part: Mapping[tuple[str, str], Array]) -> Array:
        return np.mean([_improvement(part["first", name], part["second", name]) for name in first], axis=0)

    return _interval(statistic, runs, resamples, seed)


def _interval(
    statistic: Callable[[Mapping[Key, Array]], Array], runs: Mapping[Key, Array], resamples: int, seed: int
) -> Interval:
    rng = np.random.default_rng(seed)
    drawn = {key: scores[rng.integers(len(scores), size=(resamples, len(scores)))] for key, scores in runs.items()}
    low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return float(statistic(runs)), float(low), float(high)


def _interquartile_mean(scores: Array) -> Array:
    """Over the last axis."""
    cut = scores.shape[-1] // 4
    ordered = np.sort(scores, axis=-1)
    return np.asarray(ordered[..., cut : scores.shape[-1] - cut].mean(-1))


def _improvement(first: Array, second: Array) -> Array:
    """Over the last axes."""
    difference = np.sign(first[..., :, None] - second[..., None, :])
    return np.asarray((difference.mean((-2, -1)) + 1) / 2)


def _flat(scores: ArrayLike) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be a non-empty list with one value per run, got shape {values.shape}")
    return values
