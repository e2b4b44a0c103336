"""The first lines of a run's log, which describe the run."""

from collections.abc import Mapping, Sequence

import torch

from epo_kernels.train.config import FROM_SCRATCH, TrainConfig
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.envs import Suite, Task
from epo_kernels.train.models.policy import Policy, resolve_device


def opening(config: TrainConfig, ranks: Ranks) -> str:
    """What is trained on what, and where results appear; shown before anything is loaded."""
    model, run_dir = config.model, config.run_dir
    origin = "from scratch" if model.name_or_path in FROM_SCRATCH else "pretrained"
    return "\n".join(
        [
            f"run {run_dir}: {config.algorithm.name} on {config.env.name}, seed {config.seed}",
            f"model: {model.name_or_path} ({origin}); weights in float32, matrix products in {model.dtype}, on "
            f"{_device(config, ranks)}; rollouts by {config.rollout.engine}",
            f"where to look: {run_dir}/report.html from the first evaluation on, {run_dir}/metrics.jsonl, "
            f"{run_dir}/episodes; tensorboard --logdir {run_dir}/tensorboard",
        ]
    )


def about_tasks(suite: Suite, tasks: Sequence[Task], panels: Mapping[str, Sequence[Task]], config: TrainConfig) -> str:
    """Training tasks and evaluation panels."""
    shown = ", ".join(f"{len(own)} of {panel}" for panel, own in panels.items())
    evaluation = f"{shown}, {' and '.join(config.evaluate.decoding)}" if panels else "none"
    kinds = sorted({task.name for task in tasks})
    named = ", ".join(kinds[:5]) + (f" and {len(kinds) - 5} more" if len(kinds) > 5 else "")
    return (
        f"tasks: {len(tasks)} training tasks of {suite.name} ({named}), {suite.max_turns} turns at most; "
        f"evaluation: {evaluation}"
    )


def about_policy(policy: Policy) -> str:
    """Model class and number of parameters."""
    parameters = list(policy.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    share = "all trained" if trained == total else f"{trained:,} of them trained"
    return f"policy: {type(policy.model).__name__}, {total:,} parameters, {share}"


def _device(config: TrainConfig, ranks: Ranks) -> str:
    device = resolve_device(config.model.device)
    threads = f"torch threads: {torch.get_num_threads()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    processes = f", {ranks.size} processes" if ranks.size > 1 else ""
    return f"{device.type} ({name}{processes})"
