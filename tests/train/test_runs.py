"""Whole short runs of every algorithm, with and without EPO, in both layouts; and going on where one stopped."""

import json
import shutil
import sys

import pytest

from tests.train.conftest import lines_of
from tests.train.test_main import train


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm.name=rloo", "loss.penalty=none", "algorithm.mask_truncated=true"],
        ["algorithm.name=gigpo", "algorithm.gamma=0.95", "rollout.layout=episode", "rollout.max_prompt_tokens=400"],
        ["algorithm.name=ppo", "algorithm.group_size=1", "algorithm.groups=8", "critic.warmup_steps=1"],
        ["algorithm.name=ppo", "algorithm.gae=published", "loss.penalty=none", "algorithm.kl_reward_coeff=0.01"],
        ["algorithm.refills=2", "optim.minibatch_size=8", "loss.clip_ratio_high=0.28", "model.dtype=bfloat16"],
    ],
    ids=lambda settings: settings[0] + " " + settings[1],
)
def test_every_algorithm_runs(settings, tmp_path):
    assert train(f"run_dir={tmp_path}", "evaluate.panels=[]", "algorithm.invalid_action_penalty=0.1", *settings) == 0
    lines = lines_of(tmp_path)
    assert [line["training/global_step"] for line in lines] == [1, 2]
    last = lines[-1]
    assert last["actor/skipped_updates"] == 0
    assert last["actor/grad_norm"] > 0
    assert abs(last["critic/advantages/mean"]) < 1
    if "algorithm.name=ppo" in settings:
        assert last["critic/vf_loss"] > 0
        assert last["critic/grad_norm"] > 0
        assert {"critic/vf_explained_var", "critic/values/mean", "critic/returns/mean", "critic/lr"} <= set(last)
        warming_up = "critic.warmup_steps=1" in settings
        assert ("actor/grad_norm" not in lines[0]) == warming_up
    if "algorithm.kl_reward_coeff=0.01" in settings:
        assert last["actor/reward_kl_penalty"] != 0


def test_ppo_goes_on_to_the_last_bit(tmp_path):
    settings = ["algorithm.name=ppo", "steps=3", "evaluate.panels=[]", "algorithm.refills=1", "checkpoint.keep=9"]
    assert train(f"run_dir={tmp_path / 'whole'}", *settings) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"global_step_{step}")
    assert train(f"run_dir={tmp_path / 'stopped'}", *settings) == 0
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert 0 < json.loads(text.splitlines()[-1])["perf/loss_share"] < 1


def test_adapters_without_their_package_give_the_install_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(f"run_dir={tmp_path}", "model.lora_rank=4") == 2
    assert 'pip install --constraint constraints.txt "epo-kernels[lora]"' in capsys.readouterr().err
