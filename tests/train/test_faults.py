"""Every fault that the driver is documented to survive, injected into a real run."""

import errno
import itertools
import json
import os
import pkgutil
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from epo_kernels.train.__main__ import main
from epo_kernels.train.envs.practice import PracticeEnvironment
from epo_kernels.train.io.checkpoint import list_checkpoints, load_state, step_of
from epo_kernels.train.io.failures import PromptTooLong
from epo_kernels.train.io.tracking import Tracker
from epo_kernels.train.rl.critic import Critic
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rl.post_mortem import load_batch
from epo_kernels.train.rollout.prompts import PromptBuilder
from tests.train import faults
from tests.train.conftest import WHOLE, command, files_at_most, lines_of, train, weights_of


def steps_of(run_dir):
    return [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")]


def assert_equal_runs(run_dir, whole):
    assert lines_of(run_dir) == lines_of(whole)
    last, wanted = weights_of(run_dir, 4), weights_of(whole, 4)
    assert all(torch.equal(last[name], wanted[name]) for name in wanted)
    records = [json.loads((folder / "evaluation.json").read_text()) for folder in (run_dir, whole)]
    assert records[0] == records[1]


TRAIN = "epo_kernels.train."
# The points at which a process is killed, in the order in which one run reaches them.
KILLS = {
    "while it clones": (TRAIN + "start:clone", 1),
    "while the first checkpoint is written": (TRAIN + "io.checkpoint:_flush", 2),
    "before the first checkpoint has its name": (TRAIN + "io.checkpoint:os.rename", 1),
    "in the evaluation before": (TRAIN + "trainer:summarize", 2),
    "in an update": (TRAIN + "rl.learner:Learner.update", 1),
    "with a step logged and not saved": (TRAIN + "trainer:Trainer._watch", 1),
    "while a later checkpoint is written": (TRAIN + "io.checkpoint:torch.save", 1),
    "before old checkpoints go": (TRAIN + "io.checkpoint:list_checkpoints", 3),
    "while the report is written": (TRAIN + "trainer:write_report", 1),
    "in an evaluation between": (TRAIN + "trainer:summarize", 1),
    "in a rollout": (TRAIN + "rollout.rollout:Rollout._act", 2),
}


def test_a_run_killed_again_and_again_goes_on_to_the_last_bit(whole_run, tmp_path):
    """At every listed point, then at random ones: the next process continues from the state left by the last one."""
    arguments = command(f"run_dir={tmp_path}", *WHOLE)
    for moment, fault in KILLS.items():
        assert faults.end_of(faults.start(arguments, (signal.SIGKILL, *fault))) == -9, moment
    rng = random.Random(0)
    for _ in range(4):
        process = faults.start(arguments)
        time.sleep(rng.uniform(0.1, 1.5))
        process.kill()
        faults.end_of(process)
    assert faults.end_of(faults.start(arguments)) == 0
    assert_equal_runs(tmp_path, whole_run)


TERMINATIONS = {
    "SIGTERM in a rollout": (signal.SIGTERM, TRAIN + "rollout.rollout:Rollout._act", 20),
    "SIGHUP in an evaluation between": (signal.SIGHUP, TRAIN + "trainer:summarize", 4),
    "SIGUSR1 in an update": (signal.SIGUSR1, TRAIN + "rl.learner:Learner.update", 2),
}


@pytest.mark.parametrize("moment", TERMINATIONS)
def test_a_signal_saves_and_ends_with_0(whole_run, tmp_path, moment):
    log = tmp_path / "log"
    arguments = command(f"run_dir={tmp_path / 'run'}", *WHOLE, "checkpoint.every=0")
    fault = TERMINATIONS[moment]
    assert faults.end_of(faults.start(arguments, fault, log)) == 0, log.read_text()
    assert f"stopped by {fault[0].name}; repeat the command to resume from the last checkpoint" in log.read_text()
    run_dir = tmp_path / "run"
    lines = lines_of(run_dir)
    assert steps_of(run_dir)[-1] == len(lines) < 4
    assert (run_dir / "report.html").exists()
    assert train(f"run_dir={run_dir}", *WHOLE) == 0
    assert_equal_runs(run_dir, whole_run)


def test_sigterm_before_the_first_checkpoint_ends_the_demonstrations_and_says_that_nothing_is_kept(tmp_path):
    log = tmp_path / "log"
    arguments = command(f"run_dir={tmp_path / 'run'}", *WHOLE, "model.warm_start.demonstrations=512")
    fault = (signal.SIGTERM, TRAIN + "envs.practice:PracticeSuite.demonstrate", 5)
    assert faults.end_of(faults.start(arguments, fault, log)) == 0, log.read_text()
    assert "stopped by SIGTERM; there is no checkpoint yet, so repeating the command starts over" in log.read_text()
    assert "cloned" not in log.read_text()


def test_ctrl_c_saves_too_and_so_do_two_signals_at_once(tmp_path):
    log = tmp_path / "log"
    arguments = command(f"run_dir={tmp_path / 'run'}", *WHOLE, "checkpoint.every=0")
    process = faults.start(arguments, (signal.SIGINT, TRAIN + "rl.learner:Learner.update", 3), log)
    assert faults.end_of(process) == 130
    assert "stopped by SIGINT" in log.read_text()
    assert steps_of(tmp_path / "run")[-1] == 3
    slow = faults.start(command(f"run_dir={tmp_path / 'slow'}", "steps=10000"), None, log)
    faults.wait_for(tmp_path / "slow" / "metrics.jsonl", slow)
    slow.terminate()
    slow.terminate()  # as `timeout` does
    assert faults.end_of(slow) == 0
    assert steps_of(tmp_path / "slow")[-1] == len(lines_of(tmp_path / "slow"))


@pytest.mark.parametrize("gone", ["reader of a pipe", "terminal"])
def test_output_that_nobody_takes_costs_nothing(whole_run, tmp_path, gone):
    arguments = command(f"run_dir={tmp_path / 'run'}", *WHOLE)
    if gone == "terminal":
        other, own = os.openpty()
        log = os.ttyname(own)
        process = faults.start(arguments, log=log)
    else:
        log = tmp_path / "log"
        os.mkfifo(log)
        process = faults.start(arguments, log=log)
        other, own = os.open(log, os.O_RDONLY), None
    assert os.read(other, 1)
    if own is not None:
        os.close(own)
    os.close(other)
    assert faults.end_of(process) == 0
    assert_equal_runs(tmp_path / "run", whole_run)


def failing_where(holds):
    """PracticeEnvironment.step, except that it raises in a rollout if `holds()`."""
    play = PracticeEnvironment.step

    def step(self, action):
        if threading.current_thread().name.startswith("environment-") and holds():
            raise MemoryError("a bug in the game")
        return play(self, action)

    return step


def test_too_many_failures_in_a_row_stop_the_run_with_everything_saved(whole_run, tmp_path, monkeypatch, capsys):
    settings = (f"run_dir={tmp_path}", *WHOLE, "checkpoint.every=0")
    with monkeypatch.context() as patch:
        log, logged = Tracker.log, []
        patch.setattr(Tracker, "log", lambda self, step, metrics: logged.append(log(self, step, metrics)))
        patch.setattr(PracticeEnvironment, "step", failing_where(lambda: logged))  # from step 2 on
        assert train(*settings, "env.max_failures=20") == 1
    error = capsys.readouterr().err
    assert "20 consecutive episodes were lost to their environments (env.max_failures)" in error
    assert "MemoryError: a bug in the game" in error
    assert steps_of(tmp_path)[-1] == len(lines_of(tmp_path)) == 1
    assert (tmp_path / "report.html").exists()
    assert train(*settings) == 0
    assert_equal_runs(tmp_path, whole_run)


def test_a_goal_too_long_for_the_prompt_stops_the_run_with_everything_saved(tmp_path, monkeypatch, capsys):
    settings = (f"run_dir={tmp_path}", "steps=3", "evaluate.panels=[]", "checkpoint.every=0")
    with monkeypatch.context() as patch:
        log, logged = Tracker.log, []
        patch.setattr(Tracker, "log", lambda self, step, metrics: logged.append(log(self, step, metrics)))
        encode = PromptBuilder.encode

        def refuse(self, states):
            if len(logged) == 2:
                raise PromptTooLong("rollout.max_prompt_tokens must be at least 999")
            return encode(self, states)

        patch.setattr(PromptBuilder, "encode", refuse)
        assert train(*settings) == 1
    error = capsys.readouterr().err
    assert "error: rollout.max_prompt_tokens must be at least 999" in error
    assert f"then continue with run_dir=ANOTHER resume={tmp_path}/checkpoints/global_step_2" in error
    assert steps_of(tmp_path)[-1] == len(lines_of(tmp_path)) == 2


def test_a_few_failures_cost_their_episodes_alone(tmp_path, monkeypatch):
    count = itertools.count(1)
    monkeypatch.setattr(PracticeEnvironment, "step", failing_where(lambda: next(count) in (5, 9)))
    assert train(f"run_dir={tmp_path}", "steps=2", "evaluate.panels=[]") == 0
    assert [line["episode/failed"] for line in lines_of(tmp_path)] == [2, 0]


def test_a_file_that_the_disk_refuses_leaves_the_old_checkpoint_whole(whole_run, tmp_path, capsys):
    with files_at_most(3_000_000):  # the weights fit, and the optimiser's state doesn't once it has one
        assert train(f"run_dir={tmp_path}", *WHOLE) == 1
    error = capsys.readouterr().err
    assert "the checkpoint of step 1 could not be written" in error
    assert "global_step_0 is whole. Make room" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["global_step_0"]
    assert train(f"run_dir={tmp_path}", *WHOLE) == 0
    assert_equal_runs(tmp_path, whole_run)


@pytest.mark.parametrize(
    "place",
    [
        "torch.save",
        "transformers.PreTrainedModel.save_pretrained",
        TRAIN + "io.checkpoint._flush",
        TRAIN + "io.tracking.Tracker.log",
    ],
)
def test_a_full_disk_stops_the_run_and_says_what_to_do(tmp_path, monkeypatch, capsys, place):
    def fills(*args, **kwargs):
        if (tmp_path / "checkpoints" / "global_step_0").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    original = pkgutil.resolve_name(place)
    monkeypatch.setattr(place, fills)
    assert train(f"run_dir={tmp_path}", "steps=1", "evaluate.panels=[]") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "make room" in error.lower()
    assert error.strip().count("\n") == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["global_step_0"]
    assert load_state(tmp_path / "checkpoints" / "global_step_0")["step"] == 0


def test_updates_without_a_finite_gradient_stop_the_run_and_keep_their_batch(whole_run, tmp_path, monkeypatch, capsys):
    update, calls = Learner.update, 0

    def poisoned(self, samples, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            for sample in samples:
                sample.old_log_probs = torch.full_like(sample.old_log_probs, float("nan"))
        return update(self, samples, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", poisoned)
        assert train(f"run_dir={tmp_path}", *WHOLE, "optim.max_skipped_updates=3") == 1
    error = capsys.readouterr().err
    assert "step 2: 3 policy updates in a row had a non-finite loss or gradient (loss nan, gradient norm nan" in error
    assert "all weights are finite" in error
    folder = tmp_path / "nonfinite" / "step_00002"
    assert str(folder) in error
    samples = load_batch(folder)
    assert samples
    assert all(sample.old_log_probs.isnan().all() for sample in samples)
    assert all(len(sample.old_log_probs) == len(sample.response_ids) > 0 for sample in samples)
    assert json.loads((folder / "circumstances.json").read_text())["nonfinite_weights"] == []
    assert steps_of(tmp_path)[-1] == 1
    assert train(f"run_dir={tmp_path}", *WHOLE) == 0
    assert_equal_runs(tmp_path, whole_run)


def test_updates_of_the_critic_without_a_finite_gradient_stop_the_run_too(tmp_path, monkeypatch, capsys):
    update = Critic.update

    def poisoned(self, samples, *args, **kwargs):
        samples[0].returns = torch.full_like(samples[0].returns, float("nan"))
        return update(self, samples, *args, **kwargs)

    monkeypatch.setattr(Critic, "update", poisoned)
    settings = ["algorithm.name=ppo", "critic.epochs=3", "optim.max_skipped_updates=2", "evaluate.panels=[]"]
    assert train(f"run_dir={tmp_path}", *settings) == 1
    error = capsys.readouterr().err
    assert "step 1: 2 critic updates in a row had a non-finite loss or gradient (loss nan, gradient norm" in error
    folder = tmp_path / "nonfinite" / "step_00001"
    poisoned_samples = [sample for sample in load_batch(folder) if sample.returns.isnan().any()]
    assert len(poisoned_samples) == 1
    facts = json.loads((folder / "circumstances.json").read_text())
    assert (facts["network"], facts["nonfinite_weights"], facts["penalty_weight"]) == ("critic", [], None)
    assert facts["nonfinite_tokens"] == len(set(poisoned_samples[0].turns))  # a state for each turn (algorithm.gae)


def test_a_collapse_is_told_and_stops_the_run_where_asked(whole_run, tmp_path, capsys):
    watched = (f"run_dir={tmp_path}", *WHOLE, "watch.entropy_high=0.01", "watch.patience=2", "checkpoint.every=0")
    assert train(*watched, "watch.stop=true") == 1
    told = capsys.readouterr()
    assert "warning: step 2: entropy 0." in told.out
    assert "stopped at step 2, as watch.stop asks: entropy 0." in told.err
    assert steps_of(tmp_path)[-1] == 2
    assert train(*watched) == 0
    assert "warning" not in capsys.readouterr().out, "once for each spell, over the resume too"
    assert_equal_runs(tmp_path, whole_run)


SCIENCEWORLD = [
    "quickstart",
    "env.max_turns=4",
    "model.warm_start.frozen=null",
    "model.warm_start.demonstrations=1",
    "model.warm_start.epochs=1",
    "rollout.environments=4",
    "algorithm.groups=1",
    "evaluate.panels=[]",
    "checkpoint.every=1",
]


@pytest.mark.scienceworld
def test_jvms_that_die_hang_starve_or_never_start_cost_their_episodes_alone(tmp_path, monkeypatch):
    from epo_kernels.train.envs import EnvironmentFailure
    from epo_kernels.train.envs.scienceworld.environment import ScienceWorldEnvironment
    from epo_kernels.train.envs.scienceworld.options import ScienceWorldOptions
    from epo_kernels.train.envs.scienceworld.suite import ScienceWorldSuite

    play, started = ScienceWorldEnvironment.step, itertools.count(-1)  # -1 lists the tasks, 0 plays the demonstration
    changes = {  # by the number of the environment
        2: {"options": ScienceWorldOptions(jvm_memory="24m")},  # not enough for the game
        3: {"options": ScienceWorldOptions(jvm_memory="16m")},  # not enough for the JVM, which ends at once
        4: {"step_timeout": 4.0},
    }
    blows = {4: signal.SIGSTOP, 5: signal.SIGKILL}

    def troubled_make(self):
        number = next(started)
        if number == 1:
            raise EnvironmentFailure("ScienceWorld needs Java 8 or newer and none runs")
        environment = ScienceWorldEnvironment(replace(self.config, **changes.get(number, {})))
        environment.blow, environment.steps = blows.get(number), 0
        return environment

    def troubled_step(self, action):
        self.steps += 1
        if self.steps == 2 and self.blow:
            os.kill(self.process_id, self.blow)
        return play(self, action)

    monkeypatch.setattr(ScienceWorldSuite, "make", troubled_make)
    monkeypatch.setattr(ScienceWorldEnvironment, "step", troubled_step)
    settings = [f"run_dir={tmp_path / 'run'}", f"env.cache_dir={tmp_path / 'cache'}", "steps=2", "env.step_timeout=120"]
    assert main([*SCIENCEWORLD, *settings, "algorithm.group_size=12"]) == 0
    first, second = lines_of(tmp_path / "run")
    lines = (tmp_path / "run" / "episodes" / "train_step_00001.jsonl").read_text().splitlines()
    reasons = [episode["finish"] for episode in map(json.loads, lines) if episode["failed"]]
    for reason in (
        "needs Java 8 or newer and none runs",
        "ran out of its 24m of memory; raise env.options.jvm_memory",
        "did not start within 120 s (its output: Error occurred during initialization of VM",
        "ended with code -9",
        "did not answer within 4 s",
    ):
        assert any(reason in told for told in reasons), (reason, reasons)
    assert (first["episode/failed"], first["episode/played"]) == (5, 7)
    assert (second["episode/failed"], second["episode/played"]) == (0, 12)


@pytest.mark.scienceworld
def test_a_killed_scienceworld_run_goes_on_with_the_same_tasks_seeds_and_state(tmp_path):
    arguments = [*SCIENCEWORLD, f"run_dir={tmp_path / 'run'}", f"env.cache_dir={tmp_path}", "steps=2"]
    arguments += ["algorithm.group_size=2"]
    process = faults.start(arguments, (signal.SIGKILL, TRAIN + "trainer:Trainer._watch", 2), tmp_path / "log")
    assert faults.end_of(process) == -9, (tmp_path / "log").read_text()
    run_dir = tmp_path / "run"
    path = run_dir / "episodes" / "train_step_00002.jsonl"

    def drawn():
        return [(episode["task"], episode["seed"]) for episode in map(json.loads, path.read_text().splitlines())]

    before, lines, state = drawn(), lines_of(run_dir), load_state(run_dir / "checkpoints" / "global_step_1")
    path.unlink()
    assert steps_of(run_dir)[-1] == 1
    assert main(arguments) == 0
    assert drawn() == before
    assert lines_of(run_dir)[0] == lines[0]
    assert lines_of(run_dir)[1]["actor/lr"] == lines[1]["actor/lr"]
    assert load_state(run_dir / "checkpoints" / "global_step_1")["rng"]["cpu"].equal(state["rng"]["cpu"])
    assert steps_of(run_dir)[-1] == 2
