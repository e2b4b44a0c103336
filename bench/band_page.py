"""The section of docs/evidence.md on a regime of the entropy band, and its plots."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.aggregates import (
    Interval,
    area_under_curve,
    improvement_interval,
    interquartile_mean_interval,
    performance_profile,
)
from bench.band import ARMS, INDICATOR, NO_TERM, SEEDS, TUNING_ARMS
from bench.curves import TURNS_EVERY, Curve, ends_in_noise, has_collapsed, has_recovered, late_variances
from bench.experiments import EXPERIMENTS, SERIES, Outcome, shown, success_of
from bench.report import markdown_table
from epo_kernels.train.evaluate import paired_interval

OVERVIEW = """\
## The entropy band at 30 turns

EPO is meant for long episodes with a reward at their end: there, policies are said to collapse into habits early and
to drift into noise later, and a band on each turn's entropy to prevent both. The series tests that on walks of 30
rooms, of 46 turns at most, with a model of 131,200 parameters that is first cloned from a novice. All runs of a seed
start from the same cloned policy and draw the same tasks. Arms differ in the entropy term alone; each arm's coefficient
(for the controller, its target) was chosen among three by a rule, from the tuning runs below. The control, a bonus
with the coefficient of the paper's hinge, was added after the first 32 runs of the collapse regime.

A run's end point is its sampled success on the held-out panel after training; its area is the mean height of its
training success. Both are summarized by the interquartile mean (IQM) over seeds with a 95 % bootstrap interval over
seeds. P is the probability that a run of the arm ends higher than one without an entropy term, ties counting half; an
interval that includes 0.5 shows no difference. The gain is the mean difference from the run without an entropy term of
the same seed, which starts from the same policy. Among eight comparisons, one interval may miss by chance.

A run has collapsed if its success (mean of five steps) fell below half of its best so far, by 5 points or more, and
recovered if it ended at 80 % of that best or above. A collapsed run that did not recover ended in noise if its entropy
ended above its start, and in a habit otherwise. The variances of the entropy are from the second half of training:
variance of its mean between steps, and between the turns of a step (means over runs).
"""


def band_section(name: str, arms: Collection[str], outcomes: Sequence[Outcome], curves: Sequence[Curve]) -> str:
    """Tables of a regime; `outcomes` hold one "after" record per run of the arms."""
    scores = scores_of(outcomes)
    missing = [f"{arm}, seed {seed}" for arm in arms for seed in SEEDS if seed not in scores.get(arm, {})]
    rows = [_row(arm, scores, [curve for curve in curves if curve.arm == arm]) for arm in arms if arm in scores]
    spent = [outcome.cpu_seconds for outcome in outcomes if outcome.when == "after"]
    head = ["arm", "runs", "end, IQM (%)", "P(better than no term)", "gain (points)", "area, IQM (%)"]
    fates = ["collapsed", "recovered", "habit", "noise"]
    return "\n\n".join(
        [
            *([f"**Incomplete**: {len(missing)} runs are missing."] if missing else []),
            f"![success, entropy and performance profiles](evidence_{name}.png)",
            markdown_table([*head, *fates, "variance between steps", "between turns"], rows),
            f"CPU seconds per run: {min(spent):.0f} to {max(spent):.0f}.\n",
        ]
    )


def band_verdict(results: Mapping[str, Sequence[Outcome]]) -> str:
    """Whether an entropy term helped in any experiment of the series, and what did; "" before both regimes ran."""
    ends = [_by_seed(results.get(f"band_{regime}", [])) for regime in ("collapse", "stable")]
    if not all(ends):
        return ""
    helped = [
        f"{EXPERIMENTS[name].title.removeprefix('The entropy band, ')}: {'; '.join(higher)}"
        for name in SERIES["band"]
        if EXPERIMENTS[name].keeps_curves and (higher := _that_differ(results.get(name, []))[0])
    ]
    answer = f"In some settings:** {'. '.join(helped)}."
    if not helped:
        answer = f"Not measurably:** over {len(SEEDS)} seeds in each regime, no entropy term made success end higher."
    return (
        f"**Does the entropy band help at 30 turns? {answer} The learning rate does: with 5e-4, decaying, success ends "
        f"{shown(paired_interval(*ends))} points higher than with a constant 1.5e-3 (mean over all arms, interval over "
        "seeds).\n"
    )


def _by_seed(outcomes: Sequence[Outcome]) -> list[float]:
    """Percent of success after training, mean over the arms but for the repeating one; [] if runs are missing."""
    scores = {arm: own for arm, own in scores_of(outcomes).items() if arm != INDICATOR}
    if not scores or any(len(own) < len(SEEDS) for own in scores.values()):
        return []
    return [100 * float(np.mean([own[seed] for own in scores.values()])) for seed in SEEDS]


def _that_differ(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """The arms that ended higher, and those that ended lower, than training without an entropy term."""
    scores = {arm: [*own.values()] for arm, own in scores_of(outcomes).items()}
    higher, lower = [], []
    for arm in ARMS:
        if arm in scores and arm != NO_TERM and NO_TERM in scores:
            interval = improvement_interval({"": scores[arm]}, {"": scores[NO_TERM]})
            _, low, high = interval
            found = higher if low > 0.5 else lower if high < 0.5 else []
            found.append(f"{arm}, P = {_probability(interval)}")
    return higher, lower


def band_answer(outcomes: Sequence[Outcome]) -> str:
    """In a sentence: the arms of a regime that ended higher or lower than training without an entropy term."""
    plain = scores_of(outcomes).get(NO_TERM)
    if not plain:
        return "the runs without an entropy term are missing."
    higher, lower = _that_differ(outcomes)
    told = [f"{side} with {'; '.join(arms)}" for side, arms in (("higher", higher), ("lower", lower)) if arms]
    answer = " and ".join(told) or "neither higher nor lower with any entropy term"
    return f"compared with training without an entropy term, success ended {answer} ({len(plain)} seeds)."


def tuning_table(outcomes: Sequence[Outcome]) -> str:
    """Every tuning run: candidate, seed, success before and after."""
    found = {(o.arm, o.seed, o.when): success_of(o) for o in outcomes}
    rows = [
        [arm, str(seed), f"{100 * found[arm, seed, 'before']:.1f}", f"{100 * found[arm, seed, 'after']:.1f}"]
        for arm in TUNING_ARMS
        for seed in sorted({o.seed for o in outcomes})
        if (arm, seed, "after") in found
    ]
    return markdown_table(["candidate", "seed", "success before (%)", "after (%)"], rows) + "\n"


def scores_of(outcomes: Sequence[Outcome]) -> dict[str, dict[int, float]]:
    """Success after training, by arm and seed."""
    scores: dict[str, dict[int, float]] = {}
    for outcome in outcomes:
        if outcome.when == "after":
            scores.setdefault(outcome.arm, {})[outcome.seed] = success_of(outcome)
    return scores


def _row(arm: str, scores: Mapping[str, Mapping[int, float]], curves: Sequence[Curve]) -> list[str]:
    own = [*scores[arm].values()]
    areas = [area_under_curve(curve.success) for curve in curves]
    collapsed = [curve for curve in curves if has_collapsed(curve.success)]
    lost = [ends_in_noise(curve.entropy) for curve in collapsed if not has_recovered(curve.success)]
    variances = np.mean([late_variances(curve) for curve in curves], axis=0)
    plain = {} if arm == NO_TERM else scores.get(NO_TERM, {})
    both = sorted(scores[arm].keys() & plain.keys())
    pair = [100 * plain[seed] for seed in both], [100 * scores[arm][seed] for seed in both]
    return [
        arm,
        str(len(own)),
        _percent(interquartile_mean_interval({"": own})),
        _probability(improvement_interval({"": own}, {"": [*plain.values()]})) if both else "",
        shown(paired_interval(*pair)) if both else "",
        _percent(interquartile_mean_interval({"": areas})),
        str(len(collapsed)),
        str(len(collapsed) - len(lost)),
        str(lost.count(False)),
        str(lost.count(True)),
        f"{variances[0]:.2g}",
        f"{variances[1]:.2g}",
    ]


def _probability(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _percent(interval: Interval) -> str:
    value, low, high = (100 * part for part in interval)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def plot_band(curves: Sequence[Curve], scores: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """A column an arm: success by step, and entropy by turn over the steps; last, all performance profiles."""
    from matplotlib.figure import Figure

    arms = {arm: own for arm in ARMS if (own := [curve for curve in curves if curve.arm == arm])}
    figure = Figure(figsize=(2.4 * (len(arms) + 1), 4.5), layout="constrained")
    grid = figure.subplots(2, len(arms) + 1, squeeze=False)
    by_turn = {arm: mean_by_turn(own) for arm, own in arms.items()}
    highest = max(float(np.nanmax(means)) for means in by_turn.values())
    for column, (arm, own) in enumerate(arms.items()):
        above, below = grid[0, column], grid[1, column]
        for curve in own:
            above.plot(range(1, len(curve.success) + 1), curve.success, linewidth=0.7, alpha=0.6)
        above.set_ylim(0, 1)
        above.set_title(arm, fontsize=9)
        extent = (0, TURNS_EVERY * len(by_turn[arm]), 0, by_turn[arm].shape[1])
        image = below.imshow(
            by_turn[arm].T, origin="lower", aspect="auto", vmin=0, vmax=highest, extent=extent, interpolation="nearest"
        )
        below.set_xlabel("step")
    grid[0, 0].set_ylabel("success in training")
    grid[1, 0].set_ylabel("turn")
    figure.colorbar(image, ax=grid[1, -2], label="entropy (nats)")
    thresholds = np.linspace(0, 1, 101)
    for arm in arms:
        profile = performance_profile([*scores[arm].values()], thresholds)
        grid[0, -1].step(thresholds, profile, where="post", label=arm)
    grid[0, -1].set_title("share of runs above", fontsize=9)
    grid[1, -1].axis("off")
    grid[1, -1].legend(*grid[0, -1].get_legend_handles_labels(), fontsize=8, loc="upper left")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def mean_by_turn(curves: Sequence[Curve]) -> np.ndarray:
    """(steps kept, turns) mean entropy over runs; NaN where no run got that far."""
    steps = max(len(curve.entropy_by_turn) for curve in curves)
    turns = max(len(row) for curve in curves for row in curve.entropy_by_turn)
    values = np.full((len(curves), steps, turns), np.nan)
    for index, curve in enumerate(curves):
        for step, row in enumerate(curve.entropy_by_turn):
            values[index, step, : len(row)] = [np.nan if value is None else value for value in row]
    counts = (~np.isnan(values)).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)
