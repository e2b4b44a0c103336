"""Trainers over the tiny model, and micro-batches for their losses."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from epo_kernels.integrations.trl import EPOTrainer, EPOTrainerConfig


def length_reward(completions, **kwargs):
    """Letters written; differs within groups, so advantages aren't all 0."""
    return [float(sum(c.isalpha() for c in completion)) for completion in completions]


def settings(tmp_path, **changes):
    """Arguments that GRPOConfig and EPOTrainerConfig share."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    } | changes


def make(folder, tmp_path, kind=EPOTrainer, *, trainer=None, **changes):
    """A trainer of either kind from the same weights; `trainer`: arguments for it rather than for its config."""
    config = EPOTrainerConfig if kind is EPOTrainer else GRPOConfig
    arguments = {"reward_funcs": length_reward, "train_dataset": Dataset.from_dict({"prompt": ["ab", "cde"] * 8})}
    return kind(folder, args=config(**settings(tmp_path, **changes)), **(arguments | (trainer or {})))


def both(folder, tmp_path, *, trainer=None, epo=None, **changes):
    """(TRL's trainer, ours) with the same settings; `epo`: settings that ours has alone."""
    return (
        make(folder, tmp_path, GRPOTrainer, trainer=trainer, **changes),
        make(folder, tmp_path, EPOTrainer, trainer=trainer, **({"entropy_coef": 0.0} | changes | (epo or {}))),
    )


def micro_batch(seed=0, *, sequences=4, length=9, old=True, ref=False, tools=False, vocabulary=258):
    """Inputs of `_compute_loss`: prompts padded on the left, completions of unequal length, one wholly masked out."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    lengths = torch.tensor([length, length - 3, 1, 0][:sequences])
    completion_mask = (torch.arange(length) < lengths[:, None]).long()
    prompt_mask = torch.ones(sequences, 3, dtype=torch.long)
    prompt_mask[1, 0] = 0
    inputs = {
        "prompt_ids": torch.randint(2, vocabulary, (sequences, 3), generator=draw) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, vocabulary, (sequences, length), generator=draw) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": normal(sequences),
        "num_items_in_batch": torch.tensor(37),
    }
    if tools:
        inputs["tool_mask"] = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1])[:length].expand(sequences, length).clone()
    if old:
        inputs["old_per_token_logps"] = -5.5 + 0.4 * normal(sequences, length)
    if ref:
        inputs["ref_per_token_logps"] = -5.5 + 0.4 * normal(sequences, length)
    return inputs


def loss_and_gradients(trainer, inputs, accumulated=1):
    """(loss, gradient by parameter, metrics) of one micro-batch."""
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulated
    trainer.state.max_steps = 4
    model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(ours, theirs, rtol=2e-5, atol=2e-6):
    """Loss, gradients, and every metric that TRL logs."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=rtol * 10, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert theirs[2].keys() <= ours[2].keys()
    for name, value in theirs[2].items():
        torch.testing.assert_close(
            ours[2][name], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
