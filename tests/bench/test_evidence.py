"""The evidence page matches the records, and the parts fixed beforehand do not change."""

import json
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import band, evidence, evidence_page, experiments
from epo_kernels.train.config import load_config, to_yaml
from epo_kernels.train.data import Episode
from epo_kernels.train.envs import Task
from epo_kernels.train.evaluate import summarize
from epo_kernels.train.io.tracking import read_metrics

LIFT = [name for name, one in experiments.EXPERIMENTS.items() if one.arms is experiments.ARMS]
BAND = [name for name in experiments.EXPERIMENTS if name.startswith("band_")]
BEFORE = experiments.Outcome(
    arm=experiments.RL,
    seed=0,
    when="before",
    episodes=4,
    successes=[True, False, False, False],
    scores=[100.0, 50.0, 0.0, 0.0],
    cpu_seconds=90.0,
    load=1.5,
    settings=["seed=0"],
    date="2026-11-21",
    commit="abc1234",
    machine="x86_64, 2 cores",
)
AFTER = replace(BEFORE, when="after", successes=[True, True, True, None], episodes=3)


def outcomes(arms=tuple(experiments.ARMS), seeds=(0, 1)):
    return [replace(one, arm=arm, seed=seed) for arm in arms for seed in seeds for one in (BEFORE, AFTER)]


@pytest.mark.parametrize("name", LIFT)
def test_committed_results_are_whole(name):
    experiment, found = experiments.EXPERIMENTS[name], experiments.read(name)
    for seed in experiment.seeds:
        for arm in experiments.ARMS:
            moments = [o.when for o in found if (o.arm, o.seed) == (arm, seed)]
            assert moments == ["before", "after"], f"{arm}, seed {seed}"
        # All arms of a seed start from the same policy.
        assert len({tuple(o.successes) for o in found if o.seed == seed and o.when == "before"}) == 1
    assert all(len(o.successes) >= 128 for o in found)


@pytest.mark.parametrize("name", LIFT)
def test_what_is_fixed_beforehand(name, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    experiment = experiments.EXPERIMENTS[name]
    assert len(experiment.seeds) >= 3
    config = evidence.config_of(name, experiments.RL, 0)
    assert config.evaluate.episodes >= 128
    assert (config.evaluate.panels, config.evaluate.decoding) == ([experiments.PANEL], [experiments.DECODING])
    assert config.loss.entropy_coeff > 0
    assert config.loss.penalty != "none"
    assert evidence.config_of(name, experiments.NO_ENTROPY, 0).loss.entropy_coeff == 0
    preset = load_config(experiment.preset, [])
    is_earlier = experiment.overrides != experiments.PRIMARY  # a series made before the preset became what it is
    same = (preset.steps, preset.optim, preset.algorithm) == (config.steps, config.optim, config.algorithm)
    assert same != is_earlier


def test_the_language_model_has_its_own_baseline_and_all_held_out_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    experiment = experiments.EXPERIMENTS["llm"]
    config = evidence.config_of("llm", experiment.baseline, 0)
    assert config.evaluate.episodes == 63
    assert (config.evaluate.panels, config.evaluate.decoding) == ([experiments.PANEL], [experiments.DECODING])
    assert (config.loss.entropy_coeff, config.loss.penalty) == (0, "none")
    place = evidence.folder("llm", experiment.baseline, 0)
    place.mkdir(parents=True)
    (place / "cost.jsonl").write_text(json.dumps({"start": 10.0, "run": 20.0}) + "\n")
    more = evidence.config_of("llm", experiments.CLONING, 0)
    assert more.steps == 0
    assert more.model.warm_start.epochs == 3 * config.model.warm_start.epochs


def test_the_page_compares_with_the_experiments_own_baseline():
    text = evidence_page.page({"llm": outcomes(experiments.PLAIN_ARMS)}, {})
    assert "| RL against more cloning | +0.0 (+0.0 to +0.0) |" in text
    assert "RL (2), more cloning (2)" in text


def test_more_cloning_gets_what_rl_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    place = evidence.folder("practice", experiments.RL, 1)
    place.mkdir(parents=True)
    spent = [{"start": 0.0, "run": 2.0}, {"start": 10.0, "run": 10.0}, {"start": 3.0, "run": 5.0}]  # stopped twice
    (place / "cost.jsonl").write_text("".join(json.dumps(cost) + "\n" for cost in spent))
    config = evidence.config_of("practice", experiments.CLONING, 1)
    epochs = load_config("practice", []).model.warm_start.epochs
    assert config.steps == 0
    assert config.model.warm_start.epochs == pytest.approx(epochs * 3, abs=1)


def test_an_interrupted_run_is_accounted_for(tmp_path):
    place = tmp_path / "RL-0"
    with pytest.raises(KeyboardInterrupt), evidence.account(place):
        raise KeyboardInterrupt
    with evidence.account(place) as built:
        built()
        with pytest.raises(RuntimeError, match="another process is working on"), evidence.account(place):
            pass
    interrupted, complete = map(json.loads, (place / "cost.jsonl").read_text().splitlines())
    assert interrupted["start"] == 0
    assert min(interrupted["run"], complete["start"], complete["run"]) >= 0


def test_a_killed_run_starts_over(tmp_path):
    place = tmp_path / "RL-0"
    with evidence.account(place):
        pass
    dies = (
        "import os, pathlib; from bench import evidence; "
        f"account = evidence.account(pathlib.Path({str(place)!r})); account.__enter__(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", dies], check=False, cwd=evidence.ROOT)
    assert killed.returncode == -9
    assert len((place / "cost.jsonl").read_text().splitlines()) == 1  # the cost of the killed one is unknown
    with evidence.account(place):
        assert not list(place.iterdir())
    assert len((place / "cost.jsonl").read_text().splitlines()) == 1


def test_difference_leaves_lost_episodes_out():
    value, low, high = experiments.difference([(BEFORE, AFTER)])
    assert value == pytest.approx(200 / 3)
    assert 0 <= low <= value <= high == 100
    twice = experiments.difference([(BEFORE, AFTER), (BEFORE, AFTER)])
    assert twice[0] == pytest.approx(value)
    assert twice[2] - twice[1] < high - low


def test_page_shows_every_arm_and_seed():
    text = evidence_page.page({"practice": outcomes()}, {})
    for arm in experiments.ARMS:
        for seed in (0, 1):
            assert f"| {arm} | {seed} | 25.0 (4.6 to 69.9) | 100.0 (43.9 to 100.0) | +66.7 (" in text
    assert "No results are committed yet." in text  # of the other experiment
    assert "commit abc1234" in text


def test_seeds_that_disagree_show_no_change():
    """However narrow the interval over all their episodes."""
    up = [replace(AFTER, seed=0, successes=[True] * 40), replace(BEFORE, seed=0, successes=[False] * 40)]
    down = [
        replace(AFTER, seed=1, successes=[False] * 40),
        replace(BEFORE, seed=1, successes=[True] * 20 + [False] * 20),
    ]
    text = evidence_page.page({"practice": [*up, *down]}, {})
    assert "| RL with EPO | 80 | +25.0 (+" in text
    assert "| the seeds disagree (+100.0, -50.0), so no change is shown |" in text
    assert "- The practice environment, 2 seeds: +25.0 (+" in text
    assert ") points, where the seeds disagree (+100.0, -50.0)." in text


def test_page_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(
        experiments.EXPERIMENTS, "practice", replace(experiments.EXPERIMENTS["practice"], seeds=(0, 1, 2))
    )
    text = evidence_page.page({"practice": [o for o in outcomes() if (o.arm, o.seed) != (experiments.CLONING, 1)]}, {})
    assert "**Incomplete**, seeds not run yet: RL with EPO (2), more cloning (1, 2), RL without" in text
    assert "| RL with EPO against more cloning | +0.0 (+0.0 to +0.0) |" in text  # of seed 0, which both have


def test_records_survive_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    (tmp_path / "practice.json").write_text(json.dumps([asdict(one) for one in outcomes()]))
    assert experiments.read("practice") == outcomes()
    assert experiments.read("scienceworld") == []


def test_plot_is_a_picture(tmp_path):
    path: Path = tmp_path / "plot.png"
    evidence_page.plot(outcomes(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def tuning(best):
    """Outcomes of a tuning series where the candidate at that index wins, by arm."""
    return [
        replace(AFTER, arm=band.tuning_arm(arm, candidate), seed=seed, successes=[index == best[arm], False])
        for arm, candidates in band.CANDIDATES.items()
        for index, candidate in enumerate(candidates)
        for seeds in band.TUNING_SEEDS.values()
        for seed in seeds
    ]


def test_each_arm_of_the_band_takes_its_best_candidate():
    best = {arm: number % 3 for number, arm in enumerate(band.CANDIDATES)}
    found = tuning(best)
    for arm, candidates in band.CANDIDATES.items():
        assert experiments.chosen(found, arm) == [candidates[best[arm]]]
    assert experiments.chosen(found, band.NO_TERM) == []
    assert experiments.chosen(found, band.INDICATOR) == experiments.chosen(found, band.BONUS)
    with pytest.raises(ValueError, match="the tuning of"):
        experiments.chosen(found[1:], found[0].arm.partition(",")[0])


@pytest.mark.parametrize("name", BAND)
def test_no_two_runs_share_a_file(name):
    experiment = experiments.EXPERIMENTS[name]
    runs = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds]
    assert len({evidence.beside(evidence.folder(name, *run), ".log") for run in runs}) == len(runs)


def test_all_arms_of_the_band_are_tuned_equally():
    assert {len(candidates) for candidates in band.CANDIDATES.values()} == {3}
    assert not set(band.SEEDS) & {seed for seeds in band.TUNING_SEEDS.values() for seed in seeds}
    assert len(band.SEEDS) == 10


@pytest.mark.parametrize("name", BAND)
def test_arms_of_the_band_differ_in_the_entropy_term_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    if tuned_by := experiments.EXPERIMENTS[name].tuned_by:
        (tmp_path / f"{tuned_by[0]}.json").write_text(
            json.dumps([asdict(one) for one in tuning({arm: int(arm == band.PAPER) for arm in band.CANDIDATES})])
        )
    arms = {arm: evidence.config_of(name, arm, 0) for arm in experiments.EXPERIMENTS[name].arms}
    assert len({repr(config.loss) for config in arms.values()}) == len(arms)
    first = next(iter(arms.values()))
    for config in arms.values():
        assert config.loss.kl_coeff == 0
        assert replace(config, loss=first.loss, run_dir="") == replace(first, run_dir="")


def test_a_killed_series_goes_on(tmp_path, monkeypatch):
    """Complete runs are kept, the killed one is repeated, and the results contain all of them."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    name, arms = "band_tiny", {"first": [], "second": [], "third": []}
    experiment = replace(experiments.EXPERIMENTS["band_stable"], arms=arms, seeds=(0,), tuned_by=(), jobs=1)
    monkeypatch.setitem(experiments.EXPERIMENTS, name, experiment)
    started, dies = [], {"second"}

    def process(command, **_):
        arm, seed = command[-2], int(command[-1])
        if evidence.is_complete(name, arm, seed):
            return
        started.append(arm)
        if arm in dies:
            raise subprocess.CalledProcessError(-9, command)
        complete(name, arm, seed)

    monkeypatch.setattr(evidence.subprocess, "run", process)
    monkeypatch.setattr(evidence, "commit", lambda: "abc1234")
    with pytest.raises(subprocess.CalledProcessError):
        evidence.run_all(name)
    assert [o.arm for o in experiments.read(name) if o.when == "after"] == ["first", "third"]
    dies.clear()
    evidence.run_all(name)
    assert started == ["first", "second", "third", "second"]
    assert [o.arm for o in experiments.read(name) if o.when == "after"] == list(arms)
    assert [(c.arm, c.success) for c in evidence.curves_of(name)] == [(arm, [0.25, 0.5]) for arm in arms]
    changed = replace(experiment, overrides=(*experiment.overrides, "optim.lr=0.5"))
    monkeypatch.setitem(experiments.EXPERIMENTS, name, changed)
    with pytest.raises(RuntimeError, match=r"first-0 had another optim\.lr; restore it, or remove that folder"):
        evidence.run_all(name)


def test_an_interrupted_series_starts_no_other_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    arms = {str(number): [] for number in range(20)}
    experiment = replace(experiments.EXPERIMENTS["band_stable"], arms=arms, seeds=(0,), tuned_by=(), jobs=1)
    monkeypatch.setitem(experiments.EXPERIMENTS, "band_tiny", experiment)
    started, first_runs, interrupted = [], threading.Event(), threading.Event()

    def process(command, **_):
        started.append(command[-2])
        first_runs.set()
        assert interrupted.wait(60)

    def interrupt(self):
        assert first_runs.wait(60)
        raise KeyboardInterrupt

    shutdown = ThreadPoolExecutor.shutdown

    def stopped(self, *args, **kwargs):
        shutdown(self, *args, **kwargs) if kwargs.get("cancel_futures") else None
        interrupted.set()
        shutdown(self, wait=True)

    monkeypatch.setattr(evidence.subprocess, "run", process)
    monkeypatch.setattr(evidence, "write_results", lambda name: None)
    monkeypatch.setattr(Future, "result", interrupt)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", stopped)
    with pytest.raises(KeyboardInterrupt):
        evidence.run_all("band_tiny")
    assert started == ["0"]


def complete(name, arm, seed):
    """Write the files of a complete run."""
    place = evidence.folder(name, arm, seed)
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(to_yaml(evidence.config_of(name, arm, seed)))
    (place / "cost.jsonl").write_text(json.dumps({"start": 1.0, "run": 2.0, "load": 1.0, "commit": "abc1234"}) + "\n")
    episodes = [
        Episode(Task("walk", index), index, (), turns=[], score=100.0, success=True, finish="done")
        for index in range(2)
    ]
    records = [asdict(summarize(episodes, when, 0, "iid", "sampled")) for when in ("before", "after")]
    (place / "evaluation.json").write_text(json.dumps(records))
    steps = [
        {
            "training/global_step": number + 1,
            "episode/success_rate": success,
            "actor/entropy": 0.1,
            "epo/entropy_by_turn": [0.1, 0.3, None],
        }
        for number, success in enumerate((0.25, 0.5))
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_arms_branch_from_one_cloned_policy(tmp_path, monkeypatch):
    """A branch is bit-equal to a run that clones for itself, and a policy cloned otherwise is refused."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    small = ("model.warm_start.demonstrations=4", "model.warm_start.epochs=1", "steps=2", "env.options.length=4")
    short = replace(
        experiments.EXPERIMENTS["band_stable"], arms={"arm": []}, overrides=(*band.BENCHMARK, *small), tuned_by=()
    )
    for name in ("branched", "alone"):
        monkeypatch.setitem(experiments.EXPERIMENTS, name, replace(short, shares_cloning=name != "alone"))
        evidence.run_one(name, "arm", 7)
    assert (tmp_path / "cloned" / "7" / "config.yaml").exists()
    curves = [evidence.curve_of("arm", 7, read_metrics(evidence.folder(n, "arm", 7))) for n in ("branched", "alone")]
    assert curves[0] == curves[1]
    assert (
        evidence.outcomes_of("branched", "arm", 7)[1].successes == evidence.outcomes_of("alone", "arm", 7)[1].successes
    )
    other = replace(short, overrides=(*short.overrides, "model.warm_start.epochs=2"))
    monkeypatch.setitem(experiments.EXPERIMENTS, "other", other)
    with pytest.raises(RuntimeError, match=r"cloned with another model\.warm_start\.epochs; remove that folder"):
        evidence.run_one("other", "arm", 7)
