"""Short complete runs of every algorithm, with and without EPO, in both layouts; and resuming interrupted ones."""

import json
import shutil
import sys
from typing import get_args

import pytest

from epo_kernels.config import PolicyLossName
from tests.train.conftest import lines_of
from tests.train.test_main import train

LONG_PROMPTS = "rollout.max_prompt_tokens=400"  # so that dialogues grow
ALGORITHMS = {
    "grpo": ["algorithm.refills=2", "optim.minibatch_size=8", "loss.clip_ratio_high=0.28", "model.dtype=bfloat16"],
    "grpo over turns": ["algorithm.group_over=turns", "loss.rollout_is=token"],
    "rloo": ["algorithm.name=rloo", "algorithm.mask_truncated=true"],
    "gigpo": ["algorithm.name=gigpo", "algorithm.gamma=0.95", "rollout.layout=episode", LONG_PROMPTS],
    "ppo": ["algorithm.name=ppo", "algorithm.group_size=1", "algorithm.groups=8", "critic.warmup_steps=1"],
    "ppo by tokens": [
        "algorithm.name=ppo",
        "algorithm.gae=token",
        "rollout.layout=episode",
        LONG_PROMPTS,
        "loss.rollout_is=turn",
    ],
    "ppo as published": ["algorithm.name=ppo", "algorithm.gae=published", "algorithm.kl_reward_coeff=0.01"],
}
ENTROPY_CONTROL = {
    "step and repo": ["loss.entropy_target=10", "algorithm.shape=repo", "algorithm.shape_coeff=0.05"],
    "pi and aem": [
        "loss.entropy_target=0.01",
        "loss.entropy_rule=pi",
        "loss.entropy_coeff=0.1",
        "algorithm.shape=aem",
        "rollout.layout=episode",
        LONG_PROMPTS,
    ],
    "boxed and empg": [
        "loss.entropy_target=10",
        "loss.entropy_rule=boxed",
        "algorithm.shape=empg",
        "algorithm.name=ppo",
        "algorithm.gae=token",
    ],
}
EPO = {"with EPO": ["loss.penalty=hinge"], "without": ["loss.penalty=none", "loss.entropy_coeff=0"]}


@pytest.fixture(scope="module")
def start(cloned, tmp_path_factory):
    """Settings that start from an existing policy, so that no run clones its own."""
    folder = tmp_path_factory.mktemp("start") / "policy"
    cloned.save(folder)
    return [f"model.name_or_path={folder}", "model.warm_start.demonstrations=0"]


def test_metrics_of_what_was_sampled_count_truncated_responses(start, tmp_path):
    lines = {}
    for masked in ("true", "false"):
        run = [f"run_dir={tmp_path / masked}", "evaluate.panels=[]", "steps=1", "rollout.max_response_tokens=3"]
        assert train(*run, *start, f"algorithm.mask_truncated={masked}") == 0
        (lines[masked],) = lines_of(tmp_path / masked)
    assert 0 < lines["false"]["response_length/clip_ratio"] < 1
    assert lines["true"]["actor/loss"] != lines["false"]["actor/loss"]
    of_all = ("response", "prompt_length/", "training/", "perf/total_num_tokens", "epo/entropy", "episode/")
    sampled = [name for name in lines["false"] if name.startswith(of_all)]
    assert {name: lines["true"][name] for name in sampled} == {name: lines["false"][name] for name in sampled}


@pytest.mark.parametrize("epo", EPO)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs(algorithm, epo, start, tmp_path):
    settings = [*ALGORITHMS[algorithm], *EPO[epo]]
    common = [f"run_dir={tmp_path}", "evaluate.panels=[]", "algorithm.invalid_action_penalty=0.1"]
    assert train(*common, *start, *settings) == 0
    lines = lines_of(tmp_path)
    assert [line["training/global_step"] for line in lines] == [1, 2]
    last = lines[-1]
    assert last["actor/skipped_updates"] == 0
    assert last["actor/grad_norm"] > 0
    assert last["actor/entropy"] > 0
    assert ("epo/penalty" in last) == (epo == "with EPO")
    assert abs(last["critic/advantages/mean"]) < 1
    if "algorithm.name=ppo" in settings:
        assert last["critic/vf_loss"] > 0
        assert last["critic/grad_norm"] > 0
        assert {"critic/vf_explained_var", "critic/values/mean", "critic/returns/mean", "critic/lr"} <= set(last)
        warming_up = "critic.warmup_steps=1" in settings
        assert ("actor/grad_norm" not in lines[0]) == warming_up
        assert last["actor/lr"] == pytest.approx(3e-4 * 0.5)  # optim.min_lr_ratio, warm-up of the critic or not
    assert ("episode/groups_without_variance" in last) == ("algorithm.group_size=1" not in settings)
    if "algorithm.kl_reward_coeff=0.01" in settings:
        assert last["actor/reward_kl_penalty"] != 0
    if any(setting.startswith("loss.rollout_is") for setting in settings):
        assert last["training/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)  # the engine is the learner's own model
        assert last["training/rollout_is_truncated_share"] == 0


@pytest.mark.parametrize("epo", EPO)
@pytest.mark.parametrize("policy_loss", get_args(PolicyLossName))
def test_every_policy_loss_runs(policy_loss, epo, start, tmp_path):
    """Two minibatches, so that the second is off-policy."""
    settings = [f"run_dir={tmp_path}", f"loss.policy_loss={policy_loss}", "evaluate.panels=[]", "steps=1"]
    if policy_loss in ("sapo", "gmpo"):  # by turns of a dialogue
        settings += ["loss.ratio_scope=segment", "rollout.layout=episode", LONG_PROMPTS, "seed=1"]
    assert train(*settings, *start, *EPO[epo], "optim.minibatches=2") == 0
    (line,) = lines_of(tmp_path)
    assert line["actor/skipped_updates"] == 0
    assert line["actor/grad_norm"] > 0
    assert ("epo/penalty" in line) == (epo == "with EPO")


@pytest.mark.parametrize("band", [["loss.penalty=hinge"], ["loss.penalty=none"]], ids=["band", "no band"])
@pytest.mark.parametrize("control", ENTROPY_CONTROL)
def test_entropy_control_beside_the_band_and_without_it(control, band, start, tmp_path):
    """A target out of reach from above or below: the coefficient moves the same way in every update."""
    settings = [*start, "loss.entropy_coeff=0.001", *ENTROPY_CONTROL[control], *band, "evaluate.panels=[]"]
    settings.append("optim.minibatches=2")
    assert train(f"run_dir={tmp_path}", *settings) == 0
    lines = lines_of(tmp_path)
    assert all(line["actor/skipped_updates"] == 0 and line["actor/grad_norm"] > 0 for line in lines)
    first, last = (line["actor/entropy_coeff"] for line in lines)
    begins = 0.1 if control == "pi and aem" else 1e-3
    assert begins > first > last if control == "pi and aem" else begins < first < last
    if control == "step and repo":
        assert (first, last) == (pytest.approx(1e-3 + 2 * 0.005), pytest.approx(1e-3 + 4 * 0.005))
    assert ("epo/penalty" in lines[0]) == ("loss.penalty=hinge" in band)


def test_entropy_control_goes_on_to_the_last_bit(start, tmp_path):
    settings = [*start, "evaluate.panels=[]", "checkpoint.keep=9", "steps=3", "algorithm.shape=empg"]
    settings += ["loss.entropy_target=10", "loss.entropy_rule=pi", "loss.penalty=hinge"]
    assert train(f"run_dir={tmp_path / 'whole'}", *settings) == 0
    lines = lines_of(tmp_path / "whole")
    assert len({line["actor/entropy_coeff"] for line in lines}) == 3
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"global_step_{step}")
    assert train(f"run_dir={tmp_path / 'stopped'}", *settings) == 0
    assert lines_of(tmp_path / "stopped") == lines


def test_a_corrected_run_goes_on_to_the_last_bit(start, tmp_path):
    """In bfloat16, where engine and learner do differ."""
    settings = [*start, "evaluate.panels=[]", "checkpoint.keep=9", "model.dtype=bfloat16"]
    assert train(f"run_dir={tmp_path / 'none'}", *settings, "steps=1") == 0
    settings += ["steps=3", "loss.rollout_is=token", "loss.rollout_is_cap=1"]
    assert train(f"run_dir={tmp_path / 'whole'}", *settings) == 0
    lines = lines_of(tmp_path / "whole")
    assert 0 < lines[0]["training/rollout_is_truncated_share"] < 1
    assert lines[0]["training/rollout_is_mean"] < 1
    assert lines[0]["actor/pg_loss"] != lines_of(tmp_path / "none")[0]["actor/pg_loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"global_step_{step}")
    assert train(f"run_dir={tmp_path / 'stopped'}", *settings) == 0
    assert lines_of(tmp_path / "stopped") == lines


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


@pytest.mark.parametrize(
    ("package", "setting", "extra"),
    [("peft", "model.lora_rank=4", "lora"), ("wandb", "tracking.wandb=offline", "wandb")],
)
def test_a_missing_package_gives_the_install_line(package, setting, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert train(f"run_dir={tmp_path}", setting) == 2
    assert f'pip install --constraint constraints.txt "epo-kernels[{extra}]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
