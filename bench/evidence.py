"""Does RL lift success? `python -m bench.evidence practice | scienceworld | llm | band`, `--report` for the page.

Fixed before any run: the seeds, the arms, the panel, and the primary figure, which is the success of sampled actions
on a fixed held-out panel after training, minus the success before it, for the same tasks and draws. Every run of every
seed counts. Intervals come from `paired_interval`, over the episodes of one seed and over those of all seeds.

Runs are in runs/evidence/EXPERIMENT/ARM-SEED, each a run of the driver: interrupted runs resume, killed runs start
over, complete runs are kept. The outcome of each episode goes to bench/results/evidence/EXPERIMENT.json, from which
docs/evidence.md is generated.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from bench import experiments, quickstart_page
from bench.band import CONTROL, INDICATOR
from bench.band_page import plot_band, scores_of
from bench.curves import Curve, curve_of, read_curves
from bench.evidence_page import page, plot
from bench.experiments import CLONING, EXPERIMENTS, SERIES, Outcome, chosen, read
from epo_kernels.train.__main__ import keep_freed_memory
from epo_kernels.train.config import TrainConfig, differences, is_among, load_config, only_rounding
from epo_kernels.train.io.checkpoint import list_checkpoints
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.tracking import read_evaluation, read_metrics, write_atomically

ROOT = Path(__file__).parent.parent
PAGE, RUNS = ROOT / "docs" / "evidence.md", Path("runs/evidence")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=[*EXPERIMENTS, *SERIES])
    parser.add_argument("--report", action="store_true", help="write docs/evidence.md from the existing results")
    parser.add_argument("--only", nargs=2, metavar=("ARM", "SEED"), help="one run, in this process; writes no results")
    given = parser.parse_args(words)
    if given.report == bool(given.experiment):
        parser.error(f"give one of {', '.join([*EXPERIMENTS, *SERIES])}, or --report")
    if given.only:
        run_one(given.experiment, given.only[0], int(given.only[1]))
        return 0
    if given.experiment:
        for name in SERIES.get(given.experiment, [given.experiment]):
            run_all(name)
    write_page()
    return 0


def run_all(name: str) -> None:
    """Run every arm of every seed; the results file is extended after each.

    Raises:
        subprocess.CalledProcessError: a run stopped; the same command resumes it.
        RuntimeError: a complete run had other settings.
    """
    experiment, writing = EXPERIMENTS[name], Lock()

    def run(arm: str, seed: int) -> None:
        if arm == CLONING:
            pending[experiment.baseline, seed].result()
        if is_complete(name, arm, seed):
            return
        command = [sys.executable, "-m", "bench.evidence", name, "--only", arm, str(seed)]
        log = beside(folder(name, arm, seed), ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            subprocess.run(command, check=True, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        with writing:
            write_results(name)
        print(f"{name}: {arm}, seed {seed} is complete")

    # More cloning comes last, because RL's cost determines its epochs; so do the arm that repeats another and the
    # control. Otherwise seed by seed, so that an unfinished series has all arms of its seeds.
    queue = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    queue.sort(key=lambda run: run[0] in (CLONING, INDICATOR, CONTROL))
    for arm, seed in queue:
        if is_complete(name, arm, seed):
            require_same_settings(name, arm, seed)
    with ThreadPoolExecutor(experiment.jobs) as threads:
        pending = {(arm, seed): threads.submit(run, arm, seed) for arm, seed in queue}
        try:
            for future in pending.values():
                future.result()
        except KeyboardInterrupt:  # which the runs under way receive too; no other may start
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    write_results(name)  # also where every run was complete already


def write_results(name: str) -> None:
    """Write the results file from the complete runs."""
    experiment = EXPERIMENTS[name]
    runs = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms if is_complete(name, arm, seed)]
    _write_records(name, [outcome for run in runs for outcome in outcomes_of(name, *run)])
    if experiment.keeps_curves:
        curves = [curve_of(*run, read_metrics(folder(name, *run))) for run in runs]
        _write_records(f"{name}_curves", curves)


def _write_records(stem: str, records: Sequence[Any]) -> None:
    """Write dataclasses, one per line."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    experiments.RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(experiments.RESULTS / f"{stem}.json", f"[\n{lines}\n]\n")


def run_one(name: str, arm: str, seed: int) -> None:
    """Run or resume one run of the driver; its cost goes to cost.jsonl, one line per process."""
    # Imported late, because the page needs none of it.
    from transformers.utils.logging import disable_progress_bar

    from epo_kernels.train.build import build
    from epo_kernels.train.io.stopping import StopRequest
    from epo_kernels.train.trainer import Trainer

    if is_complete(name, arm, seed):
        return
    place = folder(name, arm, seed)
    config = config_of(name, arm, seed)
    disable_progress_bar()
    keep_freed_memory()
    display = Display()
    if EXPERIMENTS[name].shares_cloning:
        config = replace(config, resume=str(cloned(config, display)))
    with (
        account(place) as built,
        StopRequest() as stop,
        display,
        build(config, display, stop=stop) as parts,
    ):
        built()
        display.table(Trainer(parts, stop).run())


def cloned(config: TrainConfig, display: Display) -> Path:
    """The checkpoint of the seed's cloned policy, from which the run branches; made if it is missing.

    Raises:
        RuntimeError: the present one was cloned with other settings.
    """
    from epo_kernels.train.build import build

    place = RUNS / "cloned" / str(config.seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    with beside(place, ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs side by side need the same one
        if not list_checkpoints(place / "checkpoints"):
            with build(replace(config, run_dir=str(place)), display):
                pass  # building clones, and saves the starting weights
    changed = differences((place / "config.yaml").read_text(), config)
    if other := [name for name in changed if is_among(name, ("env", "model", "rollout"))]:
        raise RuntimeError(f"the policy in {place} was cloned with another {', '.join(other)}; remove that folder")
    return list_checkpoints(place / "checkpoints")[0]


@contextmanager
def account(place: Path) -> Iterator[Callable[[], None]]:
    """Inside the context, measures the cost of a run's only process until `built()` and after it, for cost.jsonl.

    A run whose last process was killed, and so recorded no cost, starts over: its cost determines how long the last arm
    clones.

    Raises:
        RuntimeError: another process is working on this run.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = beside(place, ".running")
    with mark.open("a") as running:
        try:
            fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is working on {place}; wait for it to end") from error
        if mark.stat().st_size:  # left by a process that never removed it
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(exist_ok=True)
        print("its account is still to come", file=running, flush=True)
        moments = [cpu_seconds()]
        try:
            yield lambda: moments.append(cpu_seconds())
        finally:
            start, built, end = moments[0], moments[-1], cpu_seconds()
            cost = {"start": built - start, "run": end - built, "load": os.getloadavg()[2], "commit": commit()}
            with (place / "cost.jsonl").open("a") as file:
                file.write(json.dumps(cost) + "\n")
            mark.unlink()


def config_of(name: str, arm: str, seed: int) -> TrainConfig:
    """The run's settings. The epochs of cloning require RL's run of this seed to be complete."""
    return load_config(EXPERIMENTS[name].preset, [f"run_dir={folder(name, arm, seed)}", *settings(name, arm, seed)])


def settings(name: str, arm: str, seed: int) -> list[str]:
    experiment = EXPERIMENTS[name]
    own = [*experiment.overrides, f"seed={seed}", *experiment.arms[arm]]
    if experiment.tuned_by:
        own += chosen([outcome for name in experiment.tuned_by for outcome in read(name)], arm)
    if arm == CLONING:
        # From scratch, with the learning-rate schedule over all epochs: the best use of RL's cost by cloning, both
        # evaluations included.
        spent = costs(name, experiment.baseline, seed)
        cloning = next(cost["start"] for cost in spent if cost["start"])  # 0: stopped before cloning finished
        extra = sum(cost["start"] + cost["run"] for cost in spent) - cloning
        epochs = load_config(experiment.preset, [*experiment.overrides]).model.warm_start.epochs
        own.append(f"model.warm_start.epochs={math.ceil(epochs * (1 + extra / cloning))}")
    return own


def folder(name: str, arm: str, seed: int) -> Path:
    return RUNS / name / f"{arm.replace(' ', '_')}-{seed}"


def beside(place: Path, ending: str) -> Path:
    """A file named after the folder. Not `with_suffix`: names of candidates contain dots."""
    return place.with_name(place.name + ending)


def require_same_settings(name: str, arm: str, seed: int) -> None:
    """Check that a complete run was made with the experiment's present settings, under which it is published.

    Raises:
        RuntimeError: it was not; what only changes rounding may differ.
    """
    place = folder(name, arm, seed)
    changed = differences((place / "config.yaml").read_text(), config_of(name, arm, seed))
    if not only_rounding(changed):
        raise RuntimeError(f"the run in {place} had another {', '.join(changed)}; restore it, or remove that folder")


def is_complete(name: str, arm: str, seed: int) -> bool:
    place, last = folder(name, arm, seed), "before" if arm == CLONING else "after"
    return (place / "cost.jsonl").exists() and any(record.when == last for record in read_evaluation(place))


def costs(name: str, arm: str, seed: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder(name, arm, seed) / "cost.jsonl").read_text().splitlines()]


def cpu_seconds() -> float:
    """CPU seconds of this process and of the child processes it has waited for."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def outcomes_of(name: str, arm: str, seed: int) -> list[Outcome]:
    """Before and after of a complete run. More cloning starts where RL does, so its "before" is RL's."""
    place, spent = folder(name, arm, seed), costs(name, arm, seed)
    own = {record.when: record for record in read_evaluation(place)}
    if arm == CLONING:
        rl = {record.when: record for record in read_evaluation(folder(name, EXPERIMENTS[name].baseline, seed))}
        own = {"before": rl["before"], "after": own["before"]}
    return [
        Outcome(
            arm=arm,
            seed=seed,
            when=when,
            episodes=own[when].episodes,
            successes=own[when].successes,
            scores=own[when].scores,
            cpu_seconds=round(sum(cost["start"] + cost["run"] for cost in spent), 1),
            load=round(spent[-1]["load"], 1),
            settings=settings(name, arm, seed),
            date=datetime.fromtimestamp((place / "cost.jsonl").stat().st_mtime, UTC).date().isoformat(),
            commit=spent[-1]["commit"],
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
        )
        for when in ("before", "after")
    ]


def curves_of(name: str) -> list[Curve]:
    """The learning curves of an experiment; empty if it keeps none, or has none yet."""
    return read_curves(experiments.RESULTS / f"{name}_curves.json")


def write_page() -> None:
    results = {name: outcomes for name in EXPERIMENTS if (outcomes := read(name))}
    curves = {name: found for name in results if (found := curves_of(name))}
    PAGE.parent.mkdir(exist_ok=True)
    for name, outcomes in results.items():
        if name in curves:
            plot_band(curves[name], scores_of(outcomes), PAGE.parent / f"evidence_{name}.png")
        elif CLONING in EXPERIMENTS[name].arms:
            plot(outcomes, PAGE.parent / f"evidence_{name}.png")
    write_atomically(PAGE, page(results, curves, quickstart_page.read()))


if __name__ == "__main__":
    sys.exit(main())
