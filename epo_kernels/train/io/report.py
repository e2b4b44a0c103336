"""report.html: one file that opens from disk, made from what the run's folder holds. It fetches and runs nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
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
from epo_kernels.train.io.watch import Alarm, watched

Metrics = list[dict[str, Any]]
Played = tuple[str, dict[str, Any]]  # when, and the episode
SHOWN_TASKS = 3  # of each panel: the first ones, so that nobody chose them
PHASES = {  # of timing_s/*
    "gen_model": "writing",
    "gen_environment": "environments",
    "old_log_prob": "old log-probs",
    "values": "values",
    "update_critic": "critic's update",
    "update_actor": "policy's update",
}


def write_report(run_dir: Path) -> Path:
    """Make or renew `run_dir`/report.html. What has no data yet is left out."""
    metrics, records = read_metrics(run_dir), read_evaluation(run_dir)
    path = run_dir / "config.yaml"
    config_text = path.read_text(encoding="utf-8") if path.exists() else ""
    settings = read_settings(config_text)
    comparisons = sorted(compare(records), key=lambda c: (c.panel, c.decoding != "sampled"))
    html = _template().render(
        title=run_dir.resolve().name,
        subtitle=_subtitle(settings, metrics),
        headline=_headline(comparisons, metrics),
        comparisons=[
            (comparison, *_ends(comparison, records), verdict(comparison.success)) for comparison in comparisons
        ],
        records=sorted(records, key=lambda r: (r.panel, r.decoding, r.step)),
        alarms=_alarms(metrics, settings),
        sections=[
            (
                heading,
                [(name, note, chart) for name, note, draw in figures if (chart := draw(metrics, records, settings))],
            )
            for heading, figures in SECTIONS
        ],
        episodes=_sample_episodes(run_dir, records),
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


def _subtitle(settings: dict[str, Any], metrics: Metrics) -> str:
    done = metrics[-1]["training/global_step"] if metrics else 0
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
        return f"No change of success is shown: {difference:+.1f} points, and the interval holds 0."
    verb = "rose" if difference > 0 else "fell"
    return f"Success {verb} by {abs(difference):.1f} points on {first.episodes} held-out tasks."


def _ends(comparison: Comparison, records: Sequence[Record]) -> tuple[Record, Record]:
    before, after = (
        next(r for r in records if (r.panel, r.decoding, r.when) == (comparison.panel, comparison.decoding, when))
        for when in ("before", "after")
    )
    return before, after


def _alarms(metrics: Metrics, settings: dict[str, Any]) -> list[Alarm]:
    config = WatchConfig(**{setting.name: settings[f"watch.{setting.name}"] for setting in fields(WatchConfig)})
    return watched(metrics, config)[1]


def _points(metrics: Metrics, name: str) -> list[tuple[float, float]]:
    return [(entry["training/global_step"], entry[name]) for entry in metrics if entry.get(name) is not None]


def _lines(names: dict[str, str], show: Callable[[float], str] = charts.number) -> "Draw":
    """A chart of the metrics `names` (name: label) that were measured."""

    def draw(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
        series = [Series(label, points) for name, label in names.items() if (points := _points(metrics, name))]
        return charts.line_chart(", ".join(names.values()), series, show) if series else None

    return draw


def _draw_success(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    known = [entry for entry in metrics if entry.get("episode/played")]
    if not known:
        return None
    intervals = [wilson(round(e["episode/success_rate"] * e["episode/played"]), e["episode/played"]) for e in known]
    line = Series("success", _points(known, "episode/success_rate"), intervals)
    return charts.line_chart("success in training", [line], percent)


def _draw_return(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    known = [entry for entry in metrics if entry.get("episode/played")]
    if not known:
        return None
    halves = [Z_95 * entry["episode/reward/std"] / math.sqrt(entry["episode/played"]) for entry in known]
    points = _points(known, "episode/reward/mean")
    intervals = [(value - half, value + half) for (_, value), half in zip(points, halves, strict=True)]
    return charts.line_chart("return in training", [Series("return", points, intervals)])


def _draw_panels(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    places = sorted({(record.panel, record.decoding) for record in records})
    series = []
    for panel, decoding in places:
        own = sorted((r for r in records if (r.panel, r.decoding) == (panel, decoding)), key=lambda r: r.step)
        points = [(float(r.step), r.success) for r in own]
        series.append(Series(f"{panel}, {decoding}", points, [(r.success_low, r.success_high) for r in own]))
    return charts.line_chart("success on held-out tasks", series, percent) if series else None


def _entropies(metrics: Metrics) -> tuple[list[int], Grid]:
    known = [entry for entry in metrics if entry.get("epo/entropy_by_turn")]
    return [entry["training/global_step"] for entry in known], [entry["epo/entropy_by_turn"] for entry in known]


def _bounds(metrics: Metrics, settings: dict[str, Any]) -> list[list[tuple[float, float] | None]]:
    """(lower, upper) of each turn's band, a row a step; None where nothing was known."""
    known = [entry for entry in metrics if entry.get("epo/entropy_by_turn")]
    rows = []
    for index, entry in enumerate(known):
        # What the band of a step knew: the history after it, or after the step before.
        source = entry if settings["loss.history_includes_current"] else known[index - 1] if index else {}
        means = source.get("epo/history_by_turn") or []
        if settings["loss.history_scope"] == "global":
            means = means[:1] * len(entry["epo/entropy_by_turn"])
        turns = len(entry["epo/entropy_by_turn"])
        padded = [*means, *[None] * turns][:turns]
        rows.append(
            [None if m is None else (settings["loss.band_low"] * m, settings["loss.band_high"] * m) for m in padded]
        )
    return rows


def _draw_entropy_by_turn(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    steps, grid = _entropies(metrics)
    return charts.heat_map("entropy by turn and step", steps, grid) if steps else None


def _draw_band_by_turn(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    steps, grid = _entropies(metrics)
    return charts.band_map("entropy against its band", steps, grid, _bounds(metrics, settings)) if steps else None


def _draw_profile(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    steps, grid = _entropies(metrics)
    if not steps:
        return None
    rows = [(f"step {steps[-1]}", grid[-1])]
    if len(steps) > 1:
        rows.append((f"step {steps[0]}", grid[0]))
    return charts.profile("entropy by turn", rows, _bounds(metrics, settings)[-1])


def _draw_timing(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    known = [entry for entry in metrics if entry.get("timing_s/step") is not None]
    if not known:
        return None
    layers = [
        (label, [entry.get(f"timing_s/{name}") or 0.0 for entry in known])
        for name, label in PHASES.items()
        if any(entry.get(f"timing_s/{name}") for entry in known)
    ]
    told = [sum(column) for column in zip(*(values for _, values in layers), strict=True)] or [0.0] * len(known)
    layers.append(("rest", [max(e["timing_s/step"] - t, 0.0) for e, t in zip(known, told, strict=True)]))
    return charts.stacked_chart("seconds of a step", [entry["training/global_step"] for entry in known], layers)


def _share_without_spread(metrics: Metrics, records: Sequence[Record], settings: dict[str, Any]) -> Markup | None:
    points = [
        (entry["training/global_step"], entry["episode/groups_without_variance"] / entry["episode/groups"])
        for entry in metrics
        if entry.get("episode/groups")
    ]
    return (
        charts.line_chart("groups whose returns are all equal", [Series("of groups", points)], percent)
        if points
        else None
    )


Draw = Callable[[Metrics, Sequence[Record], dict[str, Any]], Markup | None]
SECTIONS: tuple[tuple[str, tuple[tuple[str, str, Draw], ...]], ...] = (
    (
        "Reward and success",
        (
            ("Success on held-out tasks", "the fixed panels, Wilson 95 %", _draw_panels),
            ("Success in training", "of a step's episodes, Wilson 95 %", _draw_success),
            ("Return in training", "mean of a step's episodes, normal 95 %", _draw_return),
        ),
    ),
    (
        "Entropy",
        (
            ("Entropy by turn", "a column a step, turns upwards", _draw_entropy_by_turn),
            ("Against its band", "where each turn's mean lies", _draw_band_by_turn),
            ("Profile and band", "entropy over the turns of an episode", _draw_profile),
            ("Entropy", "mean over the tokens the policy wrote, nats", _lines({"actor/entropy": "entropy"})),
            (
                "Tokens out of their band",
                "share of the tokens learnt from",
                _lines({"epo/band_high_share": "above", "epo/band_low_share": "below"}, percent),
            ),
            ("Band penalty", "its mean, before its weight", _lines({"epo/penalty": "penalty"})),
            ("Phase weight", "how much the penalty counts", _lines({"epo/phase_weight": "weight"})),
        ),
    ),
    (
        "Policy",
        (
            ("Clip fraction", "tokens whose ratio was clipped", _lines({"actor/pg_clipfrac": "clipped"}, percent)),
            (
                "KL",
                "nats a token",
                _lines({"actor/ppo_kl": "to the sampling policy", "actor/kl_loss": "to the start (loss term)"}),
            ),
            ("Critic's error", "squared, a state", _lines({"critic/vf_loss": "loss"})),
            ("Critic's insight", "share of the returns' variance", _lines({"critic/vf_explained_var": "explained"})),
            ("Gradient norm", "before clipping", _lines({"actor/grad_norm": "norm"})),
            ("Learning rate", "", _lines({"actor/lr": "rate"})),
            (
                "Sampler against learner",
                "difference of a token's probability",
                _lines({"training/rollout_probs_diff_mean": "mean", "training/rollout_probs_diff_max": "greatest"}),
            ),
        ),
    ),
    (
        "Health",
        (
            (
                "Actions understood",
                "share, by the environment",
                _lines({"episode/valid_action_ratio": "understood"}, percent),
            ),
            (
                "Responses cut",
                "share that reached rollout.max_response_tokens",
                _lines({"response_length/clip_ratio": "cut"}, percent),
            ),
            ("Groups that teach nothing", "all returns equal", _share_without_spread),
            (
                "Repeated tokens",
                "share of response tokens",
                _lines({"response/repeated_token_share": "repeated"}, percent),
            ),
            ("Response length", "tokens", _lines({"response_length/mean": "mean", "response_length/max": "longest"})),
            ("Episodes lost", "to their environments", _lines({"episode/failed": "lost"})),
            ("Time of a step", "seconds", _draw_timing),
        ),
    ),
)


def _sample_episodes(run_dir: Path, records: Sequence[Record]) -> list[tuple[str, list[list[Played]]]]:
    """The first tasks of each panel: each as it was played before and, when the run is over, after."""
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
