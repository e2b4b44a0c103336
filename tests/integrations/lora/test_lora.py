"""Adapters with the real PEFT: a run, the contents of its checkpoints, and resuming from them."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, ModelConfig, load_config
from epo_kernels.train.models.lora import add_adapters, without_adapters
from epo_kernels.train.models.policy import build_from_scratch, load_policy
from epo_kernels.train.rl.learner import Learner
from tests.train.conftest import SMALL, lines_of

SETTINGS = ["steps=3", "checkpoint.keep=9", "model.lora_rank=4", "optim.lr=3e-3", "evaluate.panels=[]"]


def train(run_dir, *settings):
    return main(["practice", *SMALL, *SETTINGS, f"run_dir={run_dir}", *settings])


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def run(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp(request.param)
    settings = [f"algorithm.name={request.param}", "loss.kl_coeff=0.01", "model.gradient_checkpointing=true"]
    assert train(run_dir, *settings) == 0
    return run_dir, settings


def test_checkpoints_hold_adapters_alone_and_the_base_stays(run):
    run_dir, _ = run
    checkpoints = [run_dir / "checkpoints" / f"global_step_{step}" / "actor" for step in (0, 3)]
    first, last = (load_file(path / "adapter_model.safetensors") for path in checkpoints)
    assert first.keys() == last.keys()
    assert all("lora_" in name for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert not list(checkpoints[1].glob("model*.safetensors"))
    base = load_policy(str(run_dir / "base"), ModelConfig()).model
    policy = load_policy(str(checkpoints[1]), ModelConfig(lora_rank=4)).model
    ids = torch.arange(8)[None]
    assert not torch.allclose(policy(ids).logits, base(ids).logits)
    with without_adapters(policy) as model:
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }


def test_the_policy_without_adapters_is_the_reference(run):
    lines = lines_of(run[0])
    assert all(line["actor/kl_loss"] >= 0 for line in lines)
    assert lines[-1]["actor/kl_loss"] > 0
    assert lines[-1]["training/rollout_probs_diff_max"] < 1e-5
    assert not (run[0] / "reference").exists()


def test_a_run_goes_on_to_the_last_bit(run, tmp_path):
    run_dir, settings = run
    shutil.copytree(run_dir, tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"global_step_{step}")
    assert train(tmp_path / "run", *settings) == 0
    assert lines_of(tmp_path / "run") == lines_of(run_dir)


def test_adapters_start_as_nothing_and_alone_are_trained():
    policy = build_from_scratch([], ModelConfig(), seed=0)
    plain = copy.deepcopy(policy.model)
    add_adapters(policy.model, ModelConfig(lora_rank=2, lora_targets="q_proj, v_proj"))
    ids = torch.arange(8)[None]
    assert torch.equal(policy.model(ids).logits, plain(ids).logits)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    learner = Learner(policy, None, load_config("practice", [*SMALL, "model.lora_rank=2"]))
    optimized = [p for group in learner._optimizer._adamw.param_groups for p in group["params"]]
    assert len(optimized) == len(trained)


def test_an_adapter_on_the_output_layer_is_refused():
    """Its weight would be the frozen one."""
    policy = build_from_scratch([], ModelConfig(), seed=0)
    add_adapters(policy.model, ModelConfig(lora_rank=2, lora_targets="q_proj, lm_head"))
    with pytest.raises(ConfigError, match=r"output layer must have no adapter, got peft\..*target_modules"):
        Learner(policy, None, load_config("practice", [*SMALL, "model.lora_rank=2"]))


def test_targets_that_are_not_there():
    policy = build_from_scratch([], ModelConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"model\.lora_targets=nowhere"):
        add_adapters(policy.model, ModelConfig(lora_rank=2, lora_targets="nowhere"))


def test_a_base_that_was_loaded_is_not_copied(run, tmp_path):
    base = run[0] / "base"
    settings = [f"model.name_or_path={base}", "model.warm_start.demonstrations=0", "steps=1"]
    assert train(tmp_path, *settings) == 0
    assert not (tmp_path / "base").exists()
    saved = json.loads((tmp_path / "checkpoints" / "global_step_1" / "actor" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
