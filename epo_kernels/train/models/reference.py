"""The reference model of the KL term: the policy before RL, frozen, stored in run_dir/reference."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from epo_kernels.train.config import TrainConfig
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.io.resume import Origin
from epo_kernels.train.models.loader import PolicyLoader
from epo_kernels.train.models.policy import Policy, load_policy


def reference_model(
    policy: Policy,
    origin: Origin | None,
    config: TrainConfig,
    ranks: Ranks,
    loader: PolicyLoader,
    say: Callable[[str], None],
) -> PreTrainedModel | None:
    """The model of the KL term; None if neither the loss nor the reward uses the KL. All ranks must call it.

    With LoRA it is the policy's own model, used without its adapters. Otherwise the starting policy is saved (for a
    branch, copied from the run it comes from), so that a resumed run finds the same one.
    """
    if not (config.loss.kl_coeff or config.algorithm.kl_reward_coeff):
        return None
    if config.model.lora_rank:
        return policy.model
    folder = Path(config.run_dir) / "reference"
    if origin is None:
        weights = policy.full_weights()
        if ranks.is_first:
            policy.save(folder, weights)
    elif origin.is_branch and ranks.is_first:
        load_policy(str(_source(origin, say)), config.model).save(folder)
    ranks.wait()
    return loader.load_frozen(folder)


def _source(origin: Origin, say: Callable[[str], None]) -> Path:
    """The reference of a branch: that of the run it comes from, if it has one."""
    reference = origin.checkpoint.parent.parent / "reference"
    if reference.is_dir():
        return reference
    say(f"the KL is to the policy of {origin.checkpoint}, because its run has no saved policy from before RL")
    return origin.checkpoint / "actor"
