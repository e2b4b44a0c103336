"""Evaluation on fixed panels: the same tasks and random draws every time, success with its Wilson interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.envs import EnvironmentFailure, Task

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Record:
    """One line of evaluation.json."""

    when: str  # before | step N | after
    step: int
    panel: str  # a split of the suite, such as iid
    decoding: str  # greedy | sampled
    episodes: int
    mean_score: float  # 0..100
    success: float  # share truly completed
    success_low: float  # Wilson 95 %
    success_high: float
    official_success: float  # by the published code's criterion, "done and score > 0"
    mean_turns: float
    failed: int  # episodes lost to environment failures, excluded above
    scores: list[float | None] = field(default_factory=list)  # per task, in panel order; None: failed
    successes: list[bool | None] = field(default_factory=list)
    valid_action_ratio: float | None = None  # share of actions that the environment understood

    @property
    def name(self) -> str:
        """The name of its episode files."""
        return f"{self.when.replace(' ', '_')}_{self.panel}_{self.decoding}"

    def sentence(self) -> str:
        understood = "" if self.valid_action_ratio is None else f", {self.valid_action_ratio:.1%} of actions understood"
        return (
            f"evaluation {self.when}, {self.panel}, {self.decoding}: success {self.success:.1%} "
            f"({self.success_low:.1%} to {self.success_high:.1%}), mean score {self.mean_score:.1f}, "
            f"official success {self.official_success:.1%}, {self.episodes} episodes of {self.mean_turns:.1f} turns"
            f"{understood}"
        )


@dataclass(frozen=True)
class Comparison:
    """Before against after on the same tasks: the mean difference and its paired 95 % bootstrap interval."""

    panel: str
    decoding: str
    episodes: int  # played at both moments
    success: tuple[float, float, float]  # difference of the success rates, low, high
    score: tuple[float, float, float]  # difference of the mean scores (0..100), low, high

    def sentence(self) -> str:
        difference, low, high = (100 * value for value in self.success)
        return (
            f"{self.panel}, {self.decoding}: success {difference:+.1f} points, paired 95 % interval {low:+.1f} to "
            f"{high:+.1f} over {self.episodes} episodes: {verdict(self.success)}"
        )


def verdict(interval: tuple[float, float, float]) -> str:
    """Whether a difference (difference, low, high) is significant, in words."""
    _, low, high = interval
    if low <= 0 <= high:
        return "the interval includes 0, so no change is shown"
    return "a rise" if low > 0 else "a fall"


def compare(records: Sequence[Record]) -> list[Comparison]:
    """Before against after, for each panel and decoding with both; excludes episodes lost in either evaluation."""
    by_place = {(record.panel, record.decoding, record.when): record for record in records}
    comparisons = []
    for (panel, decoding, when), before in by_place.items():
        after = by_place.get((panel, decoding, "after"))
        if when != "before" or after is None:
            continue
        # A panel is the first tasks of a split: if evaluate.episodes changed, the shorter prefix is compared.
        both = zip(before.successes, after.successes, strict=False)
        tasks = [index for index, outcomes in enumerate(both) if None not in outcomes]
        if tasks:
            intervals = [_interval(before, after, name, tasks) for name in ("successes", "scores")]
            comparisons.append(Comparison(panel, decoding, len(tasks), *intervals))
    return comparisons


def _interval(before: Record, after: Record, name: str, tasks: list[int]) -> tuple[float, float, float]:
    first, second = ([float(getattr(record, name)[index]) for index in tasks] for record in (before, after))
    return paired_interval(first, second)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + Z_95**2 / (2 * trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    scale = 1 + Z_95**2 / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not move an endpoint that is exactly 0 or 1.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The increase of a mean: (mean of after - before, low, high), in the units of the values, float64.

    A percentile bootstrap over pairs (Efron 1979): pairs are resampled with replacement, so factors common to both
    evaluations, such as task difficulty, cancel. If all differences are equal the interval has zero width, because the
    sample contains no spread.

    Args:
        before, after: (n,) values of the same n tasks, in the same order.
        confidence: confidence level, in (0, 1); symmetric in probability.
        resamples: number of resamples of the n pairs.
        seed: random seed; the same seed gives the same interval.

    Raises:
        ValueError: lengths differ, the input is empty, a value is not finite, or a setting is out of range.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"before and after must have one value per task, got shapes {first.shape}, {second.shape}")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence must be in (0, 1) and resamples >= 1, got {confidence} and {resamples}")
    differences = second - first
    if not np.isfinite(differences).all():
        raise ValueError("before and after must be finite; drop tasks that are missing in one of them")
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(differences))  # resamples at a time: 32 MB of indices
    means = np.concatenate(
        [
            differences[rng.integers(len(differences), size=(min(rows, resamples - start), len(differences)))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(differences.mean()), float(low), float(high)


_BUILT_IN_PANELS = ("iid", "ood", "train")  # their draws predate other panels


def panel_starts(tasks: Sequence[Task], panel: str, decodings: Sequence[str], seed: int) -> list[Episode]:
    """The panel's unplayed episodes, for each decoding; random draws depend only on panel and seed."""
    number = _BUILT_IN_PANELS.index(panel) if panel in _BUILT_IN_PANELS else crc32(panel.encode())
    return [
        Episode(task=task, group=index, seed=(seed, Draw.PANEL, number, index), greedy=decoding == "greedy")
        for decoding in decodings
        for index, task in enumerate(tasks)
    ]


def summarize(episodes: Sequence[Episode], when: str, step: int, panel: str, decoding: str) -> Record:
    """Raises EnvironmentFailure if every episode failed, because there is nothing to report."""
    played = [episode for episode in episodes if not episode.failed]
    if not played:
        reason = episodes[0].finish if episodes else "the panel is empty"
        raise EnvironmentFailure(f"evaluation {when} on {panel}: no episode could be played; the first: {reason}")
    successes = sum(episode.success for episode in played)
    low, high = wilson(successes, len(played))
    valid = [float(turn.valid) for episode in played for turn in episode.turns]
    return Record(
        when=when,
        step=step,
        panel=panel,
        decoding=decoding,
        episodes=len(played),
        mean_score=_mean([episode.score for episode in played]),
        success=successes / len(played),
        success_low=low,
        success_high=high,
        official_success=_mean([float(episode.official_success) for episode in played]),
        mean_turns=_mean([float(len(episode.turns)) for episode in played]),
        failed=len(episodes) - len(played),
        scores=[None if episode.failed else episode.score for episode in episodes],
        successes=[None if episode.failed else episode.success for episode in episodes],
        valid_action_ratio=_mean(valid) if valid else None,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
