import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import epo_kernels as ek
from epo_kernels.train.__main__ import main
from epo_kernels.train.checkpoint import find_checkpoint
from epo_kernels.train.config import ConfigError, load_config
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
    assert "choose another run_dir, or go on with the run that is there by resume=auto" in capsys.readouterr().err
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
        "warning: rollout.environments, optim.micro_batch_tokens changed: the same draws are rounded otherwise" in said
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


def test_resuming_with_other_settings_is_refused(whole_run, capsys):
    assert train(f"run_dir={whole_run}", *WHOLE, "optim.lr=0.5") == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["  setting   saved   now", "  optim.lr  0.0003  0.5"]


def test_where_a_run_begins(whole_run, tmp_path):
    def found(**settings):
        return find_checkpoint(load_config("practice", [f"{name}={value}" for name, value in settings.items()]))

    assert found(run_dir=whole_run).name == "global_step_4"
    assert found(run_dir=tmp_path) is None
    assert found(run_dir=tmp_path, resume="never") is None
    with pytest.raises(ConfigError, match="holds a run"):
        found(run_dir=whole_run, resume="never")
    with pytest.raises(ConfigError, match=r"no trainer\.pt"):
        found(run_dir=tmp_path, resume=str(tmp_path))


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
    assert main(["quickstart", f"run_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_the_environment_refuses_is_an_error_of_settings(tmp_path, capsys):
    assert train(f"run_dir={tmp_path}", "env.task_names=[run]") == 2
    assert "practice has no task type 'run'" in capsys.readouterr().err
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
