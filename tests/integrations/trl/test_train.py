"""Whole runs through `trainer.train()`: single- and multi-turn, with adapters, resumed."""

import shutil

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from epo_kernels.integrations.trl import HISTORY_FILE, EPOTrainer
from tests.integrations.trl.pairs import make


def test_a_run_learns_and_logs(folder, tmp_path):
    sizes = {"per_device_train_batch_size": 32, "num_generations": 16, "max_steps": 24}
    trainer = make(folder, tmp_path, gradient_checkpointing=True, **sizes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    first, last = (sum(entry["reward"] for entry in part) / 4 for part in (logs[:4], logs[-4:]))
    assert last > first
    names = {"loss", "grad_norm", "entropy", "clip_ratio/region_mean", "policy_loss", "entropy_coef"}
    names |= {"epo/penalty", "epo/band_low_share", "epo/band_high_share", "epo/phase_weight", "epo/history"}
    assert names <= logs[-1].keys()
    assert logs[0]["epo/history"] is None  # nothing was known
    assert logs[-1]["epo/history"] > 0
    assert logs[0]["epo/phase_weight"] == 2.0 > logs[-1]["epo/phase_weight"] > 1.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.05}, {"loss_type": "grpo"}],
    ids=["default", "minibatches-kl", "grpo"],
)
def test_with_epo_off_the_run_is_trls(folder, tmp_path, changes):
    runs = []
    for kind, own in ((GRPOTrainer, {}), (EPOTrainer, {"entropy_coef": 0.0})):  # one by one: each sets the seed
        runs.append(make(folder, tmp_path, kind, optim="sgd", learning_rate=0.1, **changes, **own))
        runs[-1].train()
    theirs, ours = (trainer.model.lm_head.weight.detach() for trainer in runs)
    assert float((theirs - make(folder, tmp_path).model.lm_head.weight.detach()).abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    rewards = [[entry["reward"] for entry in t.state.log_history if "reward" in entry] for t in runs]
    assert rewards[0] == rewards[1]


def test_epo_changes_the_run(folder, tmp_path):
    """At the same seed: without the band the same weights as TRL's bonus, with it others."""
    weights = []
    for changes in ({"penalty": "none"}, {"penalty": "hinge", "penalty_alpha": 30.0, "band_high": 1.0}):
        trainer = make(folder, tmp_path, entropy_coef=0.1, **changes)
        trainer.train()
        weights.append(trainer.model.lm_head.weight.detach().clone())
    assert not torch.allclose(*weights, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "beta": 0.1},
        {"history_includes_current": True},
        {"use_adaptive_entropy": True, "entropy_target": 10.0},
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, changes):
    changes = {"entropy_coef": 0.1, "band_high": 1.0, "penalty_alpha": 5.0, "save_strategy": "steps"} | changes
    whole = make(folder, tmp_path / "whole", save_steps=2, **changes)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = make(folder, tmp_path / "resumed", save_steps=100, **changes)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(resumed.history.means().nan_to_num(), whole.history.means().nan_to_num())
    assert len(resumed.history) == len(whole.history)
    assert resumed.entropy_coef == whole.entropy_coef
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_a_generation_that_a_checkpoint_cuts_is_sampled_anew(folder, tmp_path):
    """And so it is in the history: what was open of it is dropped with it."""
    changes = {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make(folder, tmp_path, **changes).train()
    resumed = make(folder, tmp_path, **changes)
    state = torch.load(tmp_path / "checkpoint-1" / HISTORY_FILE, weights_only=True)
    assert (state["num_steps"], state["open"]) == (0, None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(resumed.history) == 1  # updates 2 and 3


def test_a_checkpoint_without_history_warns(folder, tmp_path):
    trainer = make(folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / HISTORY_FILE).unlink()
    resumed = make(folder, tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="epo_history.pt"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_adapters_train_and_nothing_else(folder, tmp_path):
    trainer = make(folder, tmp_path, trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear")})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_B" in name or "lora_A" in name), name


def two_turns(prompts, trainer):
    """A rollout of two turns with the environment's answer between them, by the trainer's own model."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    answer = tokenizer(" ok ")["input_ids"]
    rollout = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for prompt in prompts:
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion, mask = [], []
        for turn in range(2):
            ids = torch.tensor([prompt_ids + completion])
            with torch.no_grad():
                written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=True)
            new = written[0, ids.shape[1] :].tolist()
            completion, mask = completion + new, mask + [1] * len(new)
            if turn == 0:
                completion, mask = completion + answer, mask + [0] * len(answer)
        rollout["prompt_ids"].append(prompt_ids)
        rollout["completion_ids"].append(completion)
        rollout["logprobs"].append([0.0] * len(completion))
        rollout["env_mask"].append(mask)
    return rollout


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"band_scope": "segment"}], ids=str)
def test_a_multi_turn_rollout(folder, tmp_path, changes):
    trainer = make(folder, tmp_path, trainer={"rollout_func": two_turns}, entropy_coef=0.1, **changes)
    trainer.train()
    means = trainer.history.means()
    assert means[:2].isfinite().all()
    assert means[2:].isnan().all()
    assert means[0] != means[1]
    assert torch.isfinite(trainer.model.lm_head.weight).all()
    shutil.rmtree(tmp_path, ignore_errors=True)
