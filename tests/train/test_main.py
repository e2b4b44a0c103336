import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch

import epo_kernels as ek
import epo_kernels.train
from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, load_config
from epo_kernels.train.io.failures import RunError
from epo_kernels.train.io.resume import find_checkpoint
from tests.train.conftest import WHOLE, lines_of, train, weights_of


def test_a_run_leaves_what_it_promises(whole_run):
    assert {path.name for path in whole_run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.json",
        "versions.json",
        "episodes",
        "checkpoints",
        "reference",
        "tensorboard",
        "report.html",
    }
    lines = lines_of(whole_run)
    assert [line["training/global_step"] for line in lines] == [1, 2, 3, 4]
    for name in (
        "actor/pg_loss",
        "actor/pg_clipfrac",
        "actor/ppo_kl",
        "actor/entropy",
        "actor/grad_norm",
        "actor/lr",
        "actor/kl_loss",
        "response_length/mean",
        "epo/phase_weight",
        "epo/band_low_share",
        "epo/band_high_share",
        "epo/entropy_by_turn",
    ):
        assert all(name in line for line in lines), name
    assert len(lines[0]["epo/entropy_by_turn"]) > 1
    assert all(line["training/rollout_probs_diff_max"] < 1e-5 for line in lines)
    records = json.loads((whole_run / "evaluation.json").read_text())
    assert [(r["when"], r["decoding"]) for r in records] == [
        (when, decoding) for when in ("before", "step 2", "after") for decoding in ("greedy", "sampled")
    ]
    assert all(r["episodes"] == 4 and r["success_low"] <= r["success"] <= r["success_high"] for r in records)
    assert "Follow the signs" in (whole_run / "episodes" / "after_iid_greedy.txt").read_text()


def test_the_same_seed_gives_the_same_run(whole_run, tmp_path):
    assert train(f"run_dir={tmp_path}", *WHOLE) == 0
    assert lines_of(tmp_path) == lines_of(whole_run)
    assert train(f"run_dir={tmp_path / 'other'}", *WHOLE, "seed=1") == 0
    assert lines_of(tmp_path / "other") != lines_of(whole_run)


def test_a_checkpoint_of_another_run_can_be_gone_on_with(whole_run, tmp_path):
    checkpoint = whole_run / "checkpoints" / "global_step_3"
    assert train(f"run_dir={tmp_path}", *WHOLE, f"resume={checkpoint}") == 0
    assert lines_of(tmp_path) == lines_of(whole_run)[3:]


def test_an_evaluation_cut_short_goes_on_with_what_is_missing(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps(records[:-1]))
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE) == 0
    assert json.loads(path.read_text()) == records


def test_bfloat16_loses_no_small_update(tmp_path):
    """AdamW's first update moves each weight by about lr, here some 1e-5 of it: bfloat16 keeps 4e-3."""
    settings = ("model.dtype=bfloat16", "optim.lr=2e-7", "optim.warmup_ratio=0", "steps=1", "evaluate.panels=[]")
    assert train(f"run_dir={tmp_path}", *settings) == 0
    before, after = weights_of(tmp_path, 0), weights_of(tmp_path, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert float((moved > 5e-8).float().mean()) > 0.9
    assert float((moved / before[name].abs()).median()) < 5e-5
    assert lines_of(tmp_path)[0]["training/rollout_probs_diff_max"] > 1e-5, "the products did run in bfloat16"


def test_a_used_folder_takes_no_checkpoint_of_another_run(whole_run, tmp_path, capsys):
    assert train(f"run_dir={tmp_path}", "steps=1", "evaluate.panels=[]") == 0
    before = lines_of(tmp_path)
    foreign = whole_run / "checkpoints" / "global_step_3"
    assert train(f"run_dir={tmp_path}", *WHOLE, f"resume={foreign}") == 2
    assert "choose another run_dir, or continue the existing run with resume=auto" in capsys.readouterr().err
    assert lines_of(tmp_path) == before


def test_a_run_can_be_rewound_to_a_checkpoint_of_its_own(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    own = tmp_path / "run" / "checkpoints" / "global_step_2"
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE, f"resume={own}") == 0
    assert lines_of(tmp_path / "run") == lines_of(whole_run)


def test_what_memory_demands_may_change_on_resume(tmp_path, capsys):
    settings = (f"run_dir={tmp_path}", "steps=2", "evaluate.panels=[]")
    assert train(*settings, "optim.micro_batch_tokens=4000", "watch.stop=true") == 0
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "global_step_2")
    assert train(*settings, "rollout.environments=2", "env.step_timeout=9") == 0
    said = capsys.readouterr().out
    assert (
        "warning: rollout.environments, optim.micro_batch_tokens changed: the same draws are rounded differently"
        in said
    )
    assert [line["training/global_step"] for line in lines_of(tmp_path)] == [2]


def test_the_penalty_s_schedule_has_a_horizon_of_its_own(tmp_path):
    settings = ("steps=3", "evaluate.panels=[]", "loss.phase_schedule=official", "loss.phase_horizon=150")
    assert train(f"run_dir={tmp_path}", *settings) == 0
    wanted = [ek.phase_weight(step, 150, "official") for step in range(3)]
    assert [line["epo/phase_weight"] for line in lines_of(tmp_path)] == wanted


def test_a_finished_run_has_nothing_left_to_do(whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert train(f"run_dir={whole_run}", *WHOLE) == 0
    assert (whole_run / "metrics.jsonl").read_bytes() == before
    assert "0 of 4 steps to do" in capsys.readouterr().out


SHORT = ("steps=2", *WHOLE[1:])


def test_a_finished_run_is_extended_under_the_schedule_that_it_began_with(tmp_path, capsys):
    assert train(f"run_dir={tmp_path / 'long'}", *WHOLE, "schedule_steps=2", "loss.phase_schedule=official") == 0
    run = (f"run_dir={tmp_path / 'run'}", *WHOLE[1:], "loss.phase_schedule=official")
    assert train(*run, "steps=2") == 0
    assert (tmp_path / "run" / "episodes" / "after_iid_greedy.txt").exists()
    assert train(*run, "steps=3") == 0
    assert "extended from 2 to 3 steps; the schedules span 2 (schedule_steps)" in capsys.readouterr().out
    assert train(*run, "steps=4") == 0
    lines, wanted = lines_of(tmp_path / "run"), lines_of(tmp_path / "long")
    assert lines == wanted
    assert [line["actor/lr"] for line in lines[1:]] == pytest.approx([3e-4 * 0.5] * 3)  # optim.min_lr_ratio
    assert [line["epo/phase_weight"] for line in lines] == [ek.phase_weight(step, 2, "official") for step in range(4)]
    records = {folder: json.loads((tmp_path / folder / "evaluation.json").read_text()) for folder in ("run", "long")}
    assert [r for r in records["run"] if r["when"] != "step 3"] == records["long"]
    last, long = weights_of(tmp_path / "run", 4), weights_of(tmp_path / "long", 4)
    assert all(torch.equal(last[name], long[name]) for name in long)
    assert train(*run, "steps=2") == 2
    assert "steps=2, but the checkpoint is from step 4; raise steps, or resume an earlier" in capsys.readouterr().err


def test_a_run_is_shortened_under_the_schedule_that_it_began_with(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    own = tmp_path / "run" / "checkpoints" / "global_step_2"
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE, "steps=3", f"resume={own}") == 0
    assert "shortened from 4 to 3 steps; the schedules span 4 (schedule_steps)" in capsys.readouterr().out
    assert lines_of(tmp_path / "run") == lines_of(whole_run)[:3]


def test_or_under_another_one_where_asked_for(whole_run, tmp_path, capsys):
    assert train(f"run_dir={tmp_path}", *SHORT) == 0
    assert train(f"run_dir={tmp_path}", *SHORT, "schedule_steps=4") == 2, "not unless it is extended"
    assert train(f"run_dir={tmp_path}", *WHOLE, "schedule_steps=4") == 0
    assert "extended from 2 to 4 steps; the schedules span 4, until now 2" in capsys.readouterr().out
    rates = [line["actor/lr"] for line in lines_of(tmp_path)]
    assert rates[2:] == [line["actor/lr"] for line in lines_of(whole_run)][2:]
    assert train(f"run_dir={tmp_path}", *WHOLE) == 0  # the horizon stays, whether it is named again or not


def test_a_branch_has_settings_of_its_own(whole_run, tmp_path, capsys):
    origin = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    checkpoint = whole_run / "checkpoints" / "global_step_3"
    settings = ["steps=5", *WHOLE[1:], "optim.lr=1e-3", "algorithm.name=ppo", "loss.history_window=2"]
    settings += ["critic.warmup_steps=1"]
    branch = (f"run_dir={tmp_path / 'branch'}", *settings, f"resume={checkpoint}")
    assert train(*branch) == 0
    said = capsys.readouterr().out
    table = said[said.index("settings of this branch") :].splitlines()[1:7]
    assert [line.split()[2:] for line in table] == [  # after date and time
        ["setting", "saved", "now"],
        ["steps", "4", "5"],
        ["algorithm.name", "grpo", "ppo"],
        ["critic.warmup_steps", "0", "1"],
        ["loss.history_window", "None", "2"],
        ["optim.lr", "0.0003", "0.001"],
    ]
    assert "the schedules still span 4 steps; schedule_steps=5 spans them all" in said
    assert "had no critic: training a new one" in said
    assert "the entropy history starts empty" in said
    lines = lines_of(tmp_path / "branch")
    assert [line["training/global_step"] for line in lines] == [4, 5]
    assert ["actor/grad_norm" in line for line in lines] == [False, True], "the new critic warms up"
    assert lines[1]["actor/lr"] == pytest.approx(1e-3 * 0.5)
    records = json.loads((tmp_path / "branch" / "evaluation.json").read_text())
    assert [(r["when"], r["step"]) for r in records[::2]] == [("before", 3), ("step 4", 4), ("after", 5)]
    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "global_step_5")
    assert train(*branch) == 0  # the same command resumes the branch
    assert lines_of(tmp_path / "branch") == lines
    assert json.loads((tmp_path / "branch" / "evaluation.json").read_text()) == records
    assert {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()} == origin


def test_a_branch_keeps_what_its_weights_were_made_with(whole_run, tmp_path, capsys):
    checkpoint = whole_run / "checkpoints" / "global_step_3"
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE, f"resume={checkpoint}", "model.name_or_path=small") == 2
    assert capsys.readouterr().err.splitlines()[-1].split() == ["model.name_or_path", "tiny", "small"]
    assert list(tmp_path.iterdir()) == []


def test_a_branch_of_a_run_without_kl_is_held_to_its_own_start(tmp_path, capsys):
    settings = ("evaluate.panels=[]", "checkpoint.keep=9", "optim.minibatches=1", "optim.epochs=1")
    assert train(f"run_dir={tmp_path / 'run'}", "steps=2", *settings) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "global_step_2"
    branch = (f"run_dir={tmp_path / 'branch'}", "steps=3", *settings, "loss.kl_coeff=0.1", f"resume={checkpoint}")
    assert train(*branch) == 0
    assert f"the KL is to the policy of {checkpoint}" in capsys.readouterr().out
    (line,) = lines_of(tmp_path / "branch")
    assert line["actor/kl_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("damage", ["cut short", "cut short, then a line break", "zeros", "no line break"])
def test_a_damaged_line_is_repaired_on_resume(whole_run, tmp_path, capsys, damage):
    shutil.copytree(whole_run, tmp_path / "run")
    run_dir = tmp_path / "run"
    for step in (3, 4):
        shutil.rmtree(run_dir / "checkpoints" / f"global_step_{step}")
    *rest, _, last, _ = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    tail = {
        "cut short": last[:-30],
        "cut short, then a line break": last[:40] + b"\n",
        "zeros": bytes(500),
        "no line break": last,
    }[damage]
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join([*rest, tail]))
    assert train(f"run_dir={run_dir}", *WHOLE) == 0
    assert lines_of(run_dir) == lines_of(whole_run)
    assert (run_dir / "evaluation.json").read_text() == (whole_run / "evaluation.json").read_text()
    for path in (whole_run / "episodes").iterdir():
        assert (run_dir / "episodes" / path.name).read_text() == path.read_text()
    assert "warning" not in capsys.readouterr().out


def test_a_line_that_is_lost_for_good_is_told(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, second[:50], *rest]) + "\n")
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE) == 0
    assert "metrics.jsonl was damaged and has been repaired; steps [2] are missing" in capsys.readouterr().out
    assert [line["training/global_step"] for line in lines_of(tmp_path / "run")] == [1, 3, 4]


def test_resuming_with_other_settings_is_refused(whole_run, capsys):
    assert train(f"run_dir={whole_run}", *WHOLE, "optim.lr=0.5") == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["  setting   saved   now", "  optim.lr  0.0003  0.5"]


def test_where_a_run_begins(whole_run, tmp_path):
    def found(**settings):
        return find_checkpoint(load_config("practice", [f"{name}={value}" for name, value in settings.items()]))

    assert found(run_dir=whole_run).name == "global_step_4"
    assert found(run_dir=tmp_path) is None
    assert found(run_dir=tmp_path, resume="never") is None
    with pytest.raises(ConfigError, match="contains a run"):
        found(run_dir=whole_run, resume="never")
    (tmp_path / "checkpoints" / "global_step_0").mkdir(parents=True)  # killed before config.yaml
    with pytest.raises(ConfigError, match="contains a run"):
        found(run_dir=tmp_path, resume="never")
    with pytest.raises(ConfigError, match=r"no trainer\.pt"):
        found(run_dir=tmp_path, resume=str(tmp_path))
    renamed = shutil.copytree(whole_run / "checkpoints" / "global_step_4", tmp_path / "best")
    with pytest.raises(ConfigError, match="best is not a checkpoint; a checkpoint's folder is called global_step_N"):
        found(run_dir=tmp_path / "new", resume=str(renamed))


def test_a_dry_run_builds_and_plays_nothing(tmp_path, capsys):
    threads = threading.active_count()
    assert train(f"run_dir={tmp_path / 'new'}", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"would run in {tmp_path / 'new'}: steps 1 to 2" in shown
    assert "2 groups of 4, 8 episodes in 4 environments" in shown
    assert not (tmp_path / "new").exists()
    assert threading.active_count() <= threads + 5  # the pool's threads end on their own


@pytest.mark.scienceworld
def test_a_dry_run_keeps_no_demonstration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["quickstart", "model.warm_start.frozen=null", f"run_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_log_begins_with_what_is_trained_and_where_to_look(tmp_path, capsys):
    settings = ("steps=1", "model.device=cpu", "model.warm_start.epochs=1", "evaluate.decoding=[greedy]")
    assert train(f"run_dir={tmp_path}", *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    stamped = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line) for line in lines]
    said = [match[1] for match in stamped if match]
    assert said[0] == f"run {tmp_path}: grpo on practice, seed 0"
    assert said[1].startswith("model: tiny (from scratch); weights in float32, matrix products in float32, on cpu (")
    assert said[2].startswith(f"where to look: {tmp_path}/report.html from the first evaluation on")
    assert said[3].startswith(
        "tasks: 512 training tasks of practice (walk), 8 turns at most; evaluation: 4 of iid, greedy"
    )
    parameters = sum(weight.numel() for weight in weights_of(tmp_path, 1).values())
    assert re.fullmatch(
        rf"cloning: \d+ turns for 1 epochs; policy: Qwen2ForCausalLM, {parameters:,} parameters, all trained", said[5]
    )
    (step,) = [line for line in said if line.startswith("step 1/1: ")]
    (metrics,) = lines_of(tmp_path)
    assert f", understood {metrics['episode/valid_action_ratio']:.0%}, " in step


def test_every_phase_tells_a_log_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("epo_kernels.train.io.display.LOG_EVERY", 0.01)
    settings = ("steps=1", "model.warm_start.epochs=3", "algorithm.name=ppo", "loss.kl_coeff=0.01")
    assert train(f"run_dir={tmp_path}", *settings) == 0
    said = capsys.readouterr().out
    for phase, unit in [
        ("cloning", "epochs"),
        ("evaluation before, iid", "episodes"),
        ("step 1, rollout", "episodes"),
        ("step 1, old log-probs", "samples"),
        ("step 1, values", "samples"),
        ("step 1, critic's update", "samples"),
        ("step 1, update", "samples"),
        ("evaluation after, iid", "episodes"),
        ("saving step 1", None),
    ]:
        told = rf"[\d.]+ of \d+ {unit} after \d+ s" if unit else r"\d+ s so far"
        assert re.search(rf"^\S+ \S+ {phase}: {told}", said, re.MULTILINE), phase


def test_the_report_is_there_from_the_first_evaluation_on(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RunError("a later failure")

    monkeypatch.setattr("epo_kernels.train.trainer.Trainer._train_step", fail)
    assert train(f"run_dir={tmp_path}", "model.warm_start.epochs=1") == 1
    assert "before" in (tmp_path / "report.html").read_text()


def test_an_unforeseen_error_keeps_its_traceback_in_the_run_s_folder(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access\nmany more lines")

    monkeypatch.setattr("epo_kernels.train.rl.learner.Learner.update", fail)
    for times in (1, 2):
        assert train(f"run_dir={tmp_path}", "evaluate.panels=[]", "model.warm_start.epochs=1") == 1
        assert capsys.readouterr().err == (
            "error: RuntimeError: CUDA error: an illegal memory access many more lines; its traceback is in "
            f"{tmp_path}/traceback.txt; repeat the command to resume from the last checkpoint\n"
        )
        kept = (tmp_path / "traceback.txt").read_text()
        assert kept.count("Traceback (most recent call last):\n") == times
        assert kept.count("in _train_step\n") == times
    assert train(f"run_dir={tmp_path / 'dry'}", "--dry-run") == 0
    monkeypatch.setattr("epo_kernels.train.build.make_suite", fail)
    assert train(f"run_dir={tmp_path / 'dry'}", "--dry-run") == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):\n")
    assert not (tmp_path / "dry").exists()


def test_an_unforeseen_error_at_the_start_does_not_block_the_folder(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug in a plug-in")

    settings = (f"run_dir={tmp_path / 'new'}", "evaluate.panels=[]", "model.warm_start.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr("epo_kernels.train.build.make_suite", fail)
        assert train(*settings) == 1
    assert "there is no checkpoint yet, so repeating the command starts over" in capsys.readouterr().err
    assert train(*settings) == 0


def test_an_unforeseen_error_does_not_make_a_foreign_folder_ours(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("a broken installation")

    (tmp_path / "tensorboard").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("epo_kernels.train.build.require_peft", fail)
        assert train(f"run_dir={tmp_path}") == 1
    assert train(f"run_dir={tmp_path}") == 2
    assert "contains files that this driver did not write" in capsys.readouterr().err


def test_records_without_a_checkpoint_are_not_erased(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(f"run_dir={tmp_path / 'run'}", *WHOLE) == 2
    assert "checkpoints were removed, so it cannot be resumed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_an_error_that_names_its_reason_needs_no_traceback(tmp_path, capsys):
    quick = ("evaluate.panels=[]", "model.warm_start.epochs=1")
    cut = ("algorithm.mask_truncated=true", "rollout.max_response_tokens=1")
    assert train(f"run_dir={tmp_path}", *quick, *cut) == 1
    assert capsys.readouterr().err.startswith("error: every response reaches rollout.max_response_tokens=1")
    assert not (tmp_path / "traceback.txt").exists()


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("epo_kernels.train.find_spec", lambda name: None if name in ("rich", "jinja2") else name)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(epo_kernels.train.__path__[0] + "/__main__.py", run_name="__main__")
    assert ended.value.code == 'error: the driver needs rich, jinja2: pip install "epo-kernels[train]"'


def test_the_extra_names_what_the_driver_checks_for():
    extra = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in extra["train"]} == set(epo_kernels.train.REQUIRED)


def test_what_the_environment_refuses_is_an_error_of_settings(tmp_path, capsys):
    assert train(f"run_dir={tmp_path}", "env.options.task_names=[run]") == 2
    assert "env.options.task_names must be one of walk, long-walk, got 'run'" in capsys.readouterr().err
    assert train(f"run_dir={tmp_path}", "model.name_or_path=/nowhere/at/all") == 2
    assert "model.name_or_path=/nowhere/at/all: there is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_and_print_config(capsys):
    assert main(["--help"]) == 0
    assert "python -m epo_kernels.train practice" in capsys.readouterr().out
    assert main(["practice", "seed=9", "--print-config"]) == 0
    assert "seed: 9\n" in capsys.readouterr().out


@pytest.mark.scienceworld
def test_the_real_scienceworld_end_to_end(tmp_path):
    settings = [
        f"run_dir={tmp_path}",
        "steps=1",
        "env.max_turns=4",
        "model.warm_start.demonstrations=2",
        "model.warm_start.epochs=2",
        "rollout.environments=2",
        "algorithm.groups=1",
        "algorithm.group_size=2",
        "evaluate.episodes=2",
        "evaluate.decoding=[sampled]",
    ]
    command = [sys.executable, "-m", "epo_kernels.train", "quickstart", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "success (95 %)" in ended.stdout
    (line,) = lines_of(tmp_path)
    assert line["episode/failed"] == 0
    assert "You" in (tmp_path / "episodes" / "before_iid_sampled.txt").read_text()
    assert [r["when"] for r in json.loads((tmp_path / "evaluation.json").read_text())] == ["before", "after"]
