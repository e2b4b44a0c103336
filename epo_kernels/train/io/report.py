"""report.html: one self-contained file, built from the run's folder. It loads nothing and contains no scripts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from epo_kernels.train.config import WatchConfig, read_settings
from epo_kernels.train.evaluate import Z_95, Comparison, Record, compare, verdict, wilson
from epo_kernels.train.io import charts
from epo_kernels.train.io.charts import Grid, Series, percent
from epo_kernels.train.io.text import printable
from epo_kernels.train.io.tracking import read_episodes, read_evaluation, read_metrics, read_versions, write_atomically
from epo_kernels.train.io.watch import watched

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder: the lines of metrics.jsonl, the evaluations, the settings by name."""

    metrics: Metrics
    records: list[Record]
    settings: dict[str, Any]

    def lines_with(self, name: str) -> Metrics:
        return [line for line in self.metrics if line.get(name)]


Played = tuple[str, dict[str, Any]]  # when, and the episode
SHOWN_TASKS = 3  # per panel: always the first ones, so that they are not cherry-picked


def write_report(run_dir: Path) -> Path:
    """Create or update `run_dir`/report.html. Sections without data are omitted."""
    path = run_dir / "config.yaml"
    config_text = path.read_text(encoding="utf-8") if path.exists() else ""
    run = Run(read_metrics(run_dir), read_evaluation(run_dir), read_settings(config_text))
    comparisons = sorted(compare(run.records), key=lambda c: (c.panel, c.decoding != "sampled"))
    record_of = {(r.panel, r.decoding, r.when): r for r in run.records}
    watch = WatchConfig(**{setting.name: run.settings[f"watch.{setting.name}"] for setting in fields(WatchConfig)})
    html = _template().render(
        title=run_dir.resolve().name,
        subtitle=_subtitle(run),
        headline=_headline(comparisons, run.metrics),
        comparisons=[
            (c, *(record_of[c.panel, c.decoding, when] for when in ("before", "after")), verdict(c.success))
            for c in comparisons
        ],
        records=sorted(run.records, key=lambda r: (r.panel, r.decoding, r.step)),
        alarms=watched(run.metrics, watch)[1],
        sections=[
            (heading, [(name, note, chart) for name, note, draw in figures if (chart := draw(run))])
            for heading, figures in SECTIONS.items()
        ],
        episodes=_sample_episodes(run_dir, run.records),
        config=printable(config_text),
        versions=read_versions(run_dir),
    )
    report = run_dir / "report.html"
    write_atomically(report, html)
    return report


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("epo_kernels.train", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "printable": printable}
    return environment.get_template("report.html.jinja")


def _subtitle(run: Run) -> str:
    settings = run.settings
    done = run.metrics[-1]["training/global_step"] if run.metrics else 0
    return (
        f"{settings['algorithm.name'].upper()} on {settings['env.name']}, policy {settings['model.name_or_path']}, "
        f"step {done} of {settings['steps']}, seed {settings['seed']}"
    )


def _headline(comparisons: Sequence[Comparison], metrics: Metrics) -> str:
    if not comparisons:
        return "Training has begun." if metrics else "Nothing trained yet."
    first = comparisons[0]
    difference, low, high = (100 * value for value in first.success)
    if low <= 0 <= high:
        return f"No significant change in success: {difference:+.1f} points, and the interval includes 0."
    verb = "rose" if difference > 0 else "fell"
    kind = "training" if first.panel == "train" else "held-out"
    return f"Success {verb} by {abs(difference):.1f} points on {first.episodes} {kind} tasks."


def _lines(
    names: dict[str, str],
    show: Callable[[float], str] = charts.number,
    interval: Callable[[dict[str, Any]], tuple[float, float]] | None = None,
) -> "Draw":
    """A chart of the metrics `names` (name: label) that were measured, with an interval for each line of metrics."""

    def draw(run: Run) -> Markup | None:
        series = []
        for name, label in names.items():
            known = [line for line in run.metrics if line.get(name) is not None]
            points = [(line["training/global_step"], line[name]) for line in known]
            series += [Series(label, points, [interval(line) for line in known] if interval else [])] if known else []
        return charts.line_chart(", ".join(names.values()), series, show) if series else None

    return draw


def _of_success(line: dict[str, Any]) -> tuple[float, float]:
    return wilson(round(line["episode/success_rate"] * line["episode/played"]), line["episode/played"])


def _of_return(line: dict[str, Any]) -> tuple[float, float]:
    half = Z_95 * line["episode/reward/std"] / math.sqrt(line["episode/played"])
    return line["episode/reward/mean"] - half, line["episode/reward/mean"] + half


def _draw_panels(run: Run) -> Markup | None:
    series = []
    for panel, decoding in sorted({(record.panel, record.decoding) for record in run.records}):
        own = sorted((r for r in run.records if (r.panel, r.decoding) == (panel, decoding)), key=lambda r: r.step)
        points = [(float(r.step), r.success) for r in own]
        series.append(Series(f"{panel}, {decoding}", points, [(r.success_low, r.success_high) for r in own]))
    return charts.line_chart("success on the panels", series, percent) if series else None


def _entropies(run: Run) -> tuple[list[int], Grid]:
    known = run.lines_with("epo/entropy_by_turn")
    return [line["training/global_step"] for line in known], [line["epo/entropy_by_turn"] for line in known]


def _bounds(run: Run) -> list[list[tuple[float, float] | None]]:
    """(lower, upper) of each turn's band, a row per step; None where it is unknown."""
    known, settings = run.lines_with("epo/entropy_by_turn"), run.settings
    rows = []
    for index, line in enumerate(known):
        # The history used by a step's band: after that step, or after the step before.
        source = line if settings["loss.history_includes_current"] else known[index - 1] if index else {}
        means = source.get("epo/history_by_turn") or []
        turns = len(line["epo/entropy_by_turn"])
        if settings["loss.history_scope"] == "global":
            means = means[:1] * turns
        padded = [*means, *[None] * turns][:turns]
        rows.append(
            [None if m is None else (settings["loss.band_low"] * m, settings["loss.band_high"] * m) for m in padded]
        )
    return rows


def _draw_entropy_by_turn(run: Run) -> Markup | None:
    steps, grid = _entropies(run)
    return charts.heat_map("entropy by turn and step", steps, grid) if steps else None


def _draw_band_by_turn(run: Run) -> Markup | None:
    steps, grid = _entropies(run)
    return charts.band_map("entropy against its band", steps, grid, _bounds(run)) if steps else None


def _draw_profile(run: Run) -> Markup | None:
    steps, grid = _entropies(run)
    if not steps:
        return None
    series: list[Series] = []
    for index in dict.fromkeys((len(steps) - 1, 0)):  # the last step, then the first
        known = [(turn, value) for turn, value in enumerate(grid[index], 1) if value is not None]
        limits = _bounds(run)[index] if not series else []
        has_band = any(limit is not None and math.isfinite(limit[1]) for limit in limits)
        band = [
            limit if (limit := limits[turn - 1]) is not None and math.isfinite(limit[1]) else (value, value)
            for turn, value in known
            if has_band
        ]
        series.append(Series(f"step {steps[index]}{' and its band' if has_band else ''}", known, band))
    return charts.line_chart("entropy by turn", series, over="turn")


Draw = Callable[[Run], Markup | None]
_MISMATCH = {"training/rollout_probs_diff_mean": "mean", "training/rollout_probs_diff_max": "greatest"}
_KL = {"actor/ppo_kl": "to the sampling policy", "actor/kl_loss": "to the start (loss term)"}
_OUT_OF_BAND = {"epo/band_high_share": "above", "epo/band_low_share": "below"}
_TIMES = {
    "timing_s/step": "step",
    "timing_s/gen_model": "writing",
    "timing_s/gen_environment": "environments",
    "timing_s/old_log_prob": "old log-probs",
    "timing_s/values": "values",
    "timing_s/update_critic": "critic's update",
    "timing_s/update_actor": "policy's update",
}
_SUCCESS, _RETURN = {"episode/success_rate": "success"}, {"episode/reward/mean": "return"}
_LENGTH = {"response_length/mean": "mean", "response_length/max": "longest"}
SECTIONS: dict[str, list[tuple[str, str, Draw]]] = {  # (title, note, chart)
    "Reward and success": [
        ("Success on the panels", "fixed tasks, Wilson 95 %", _draw_panels),
        ("Success in training", "episodes of a step, Wilson 95 %", _lines(_SUCCESS, percent, _of_success)),
        ("Return in training", "mean over a step's episodes, normal 95 %", _lines(_RETURN, interval=_of_return)),
    ],
    "Entropy": [
        ("Entropy by turn", "one column per step, turns upwards", _draw_entropy_by_turn),
        ("Against its band", "position of each turn's mean", _draw_band_by_turn),
        ("Profile and band", "entropy over the turns of an episode", _draw_profile),
        ("Entropy", "mean over generated tokens, nats", _lines({"actor/entropy": "entropy"})),
        ("Tokens outside the band", "share of training tokens", _lines(_OUT_OF_BAND, percent)),
        ("Band penalty", "mean, before its weight", _lines({"epo/penalty": "penalty"})),
        ("Phase weight", "weight of the penalty", _lines({"epo/phase_weight": "weight"})),
    ],
    "Policy": [
        ("Clip fraction", "tokens whose ratio was clipped", _lines({"actor/pg_clipfrac": "clipped"}, percent)),
        ("KL", "nats per token", _lines(_KL)),
        ("Critic's error", "squared, a state", _lines({"critic/vf_loss": "loss"})),
        ("Explained variance", "share of the returns' variance", _lines({"critic/vf_explained_var": "explained"})),
        ("Gradient norm", "before clipping", _lines({"actor/grad_norm": "norm"})),
        ("Learning rate", "", _lines({"actor/lr": "rate"})),
        ("Rollout mismatch", "difference in token probability", _lines(_MISMATCH)),
    ],
    "Health": [
        ("Actions understood", "share", _lines({"episode/valid_action_ratio": "understood"}, percent)),
        ("Truncated responses", "share at the token limit", _lines({"response_length/clip_ratio": "cut"}, percent)),
        ("Zero-variance groups", "all returns equal", _lines({"episode/groups_without_variance": "groups"})),
        ("Repeated tokens", "share of response tokens", _lines({"response/repeated_token_share": "repeated"}, percent)),
        ("Response length", "tokens", _lines(_LENGTH)),
        ("Lost episodes", "environment failures", _lines({"episode/failed": "lost"})),
        ("Time per step", "seconds, in total and by phase", _lines(_TIMES)),
    ],
}


def _sample_episodes(run_dir: Path, records: Sequence[Record]) -> list[tuple[str, list[list[Played]]]]:
    """The first tasks of each panel, each as played before and, once the run is over, after training."""
    found = []
    for panel, decoding in sorted({(r.panel, r.decoding) for r in records}, key=lambda p: (p[0], p[1] != "sampled")):
        moments = [
            [(when, episode) for episode in episodes[:SHOWN_TASKS]]
            for when in ("before", "after")
            if (episodes := read_episodes(run_dir, f"{when}_{panel}_{decoding}"))
        ]
        if moments:
            found.append((f"{panel}, {decoding}", [list(task) for task in zip(*moments, strict=False)]))
    return found
