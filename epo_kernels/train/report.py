"""report.html: one file that opens from disk, made from what the run's folder holds."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epo_kernels.train.tracking import read_evaluation, read_metrics, write_atomically

Metrics = list[dict[str, Any]]
SHOWN_EPISODES = 2  # of each evaluation


def write_report(run_dir: Path) -> Path:
    """Make or renew `run_dir`/report.html. Sections without data are left out."""
    metrics = read_metrics(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("epo_kernels.train", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    config = run_dir / "config.yaml"
    html = environment.get_template("report.html.jinja").render(
        title=run_dir.name,
        steps=metrics[-1]["training/global_step"] if metrics else 0,
        records=sorted(read_evaluation(run_dir), key=lambda r: (r.panel, r.decoding, r.step)),
        figures=[(title, note, _svg(draw, metrics)) for title, note, draw in FIGURES] if metrics else [],
        episodes=_sample_episodes(run_dir),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
    path = run_dir / "report.html"
    write_atomically(path, html)
    return path


def _draw_reward(axes: Axes, metrics: Metrics) -> None:
    _line(axes, metrics, "episode/reward/mean", "return")
    _line(axes, metrics, "episode/success_rate", "success")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _draw_entropy(axes: Axes, metrics: Metrics) -> None:
    _line(axes, metrics, "actor/entropy", "entropy (nats a token)")


def _draw_entropy_by_turn(axes: Axes, metrics: Metrics) -> None:
    rows = [entry["epo/entropy_by_turn"] for entry in metrics]
    grid = np.full((max(map(len, rows)), len(rows)), np.nan)
    for column, row in enumerate(rows):
        grid[: len(row), column] = [np.nan if value is None else value for value in row]
    steps = [entry["training/global_step"] for entry in metrics]
    edges = (steps[0] - 0.5, steps[-1] + 0.5, 0.5, len(grid) + 0.5)
    image = axes.imshow(grid, aspect="auto", origin="lower", extent=edges, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="nats")
    axes.set_ylabel("turn")


def _draw_band(axes: Axes, metrics: Metrics) -> None:
    _line(axes, metrics, "epo/band_low_share", "share below")
    _line(axes, metrics, "epo/band_high_share", "share above")
    _line(axes, metrics, "epo/phase_weight", "phase weight")
    _line(axes, metrics, "epo/penalty", "penalty")


def _draw_policy(axes: Axes, metrics: Metrics) -> None:
    _line(axes, metrics, "actor/pg_clipfrac", "clip fraction")
    _line(axes, metrics, "actor/ppo_kl", "KL to the sampling policy")
    _line(axes, metrics, "actor/kl_loss", "KL to the reference")


def _draw_gradient(axes: Axes, metrics: Metrics) -> None:
    _line(axes, metrics, "actor/grad_norm", "gradient norm")


def _draw_timing(axes: Axes, metrics: Metrics) -> None:
    names = ("gen", "old_log_prob", "update_actor")
    steps = [entry["training/global_step"] for entry in metrics]
    parts = [[entry[f"timing_s/{name}"] for entry in metrics] for name in names]
    axes.stackplot(steps, parts, labels=["rollout", "old log-probs", "update"])
    axes.set_ylabel("seconds")


FIGURES: tuple[tuple[str, str, Callable[[Axes, Metrics], None]], ...] = (
    ("Return and success in training", "sampled episodes of training tasks, a mean a step", _draw_reward),
    ("Entropy", "mean over the tokens the policy wrote", _draw_entropy),
    ("Entropy by turn", "steps to the right, turns upwards", _draw_entropy_by_turn),
    ("Entropy band", "share of tokens out of the band, and the weight of its penalty", _draw_band),
    ("Policy change", "how far an update moves the policy", _draw_policy),
    ("Gradient norm", "before clipping", _draw_gradient),
    ("Time of a step", "", _draw_timing),
)


def _line(axes: Axes, metrics: Metrics, name: str, label: str) -> None:
    """Draw a metric over steps; one that wasn't measured leaves nothing."""
    points = [(entry["training/global_step"], entry[name]) for entry in metrics if entry.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)


def _svg(draw: Callable[[Axes, Metrics], None], metrics: Metrics) -> Markup:
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, metrics)
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # made by matplotlib from numbers: safe to embed


def _sample_episodes(run_dir: Path) -> list[tuple[str, list[str]]]:
    """(evaluation, texts) of the first episodes before and after."""
    found = []
    for when in ("before", "after"):
        for path in sorted((run_dir / "episodes").glob(f"{when}_*.txt")):
            texts = path.read_text(encoding="utf-8").split("\n\n# ")
            first, rest = texts[0], [f"# {text}" for text in texts[1:SHOWN_EPISODES]]
            found.append((path.stem.replace("_", ", "), [first, *rest]))
    return found
