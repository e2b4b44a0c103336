"""Floating-point operations of a training step.

A token's forward pass takes 2 operations per weight of a linear layer, and 4 per position and query number for
attention; a backward pass twice as many, and a recomputed forward pass one more (arXiv 2204.02311, appendix B). The
head is applied to response tokens alone: 2 per weight to score them, 6 in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from epo_kernels.train.config import TrainConfig
from epo_kernels.train.envs.registry import suite_class
from epo_kernels.train.plan.architecture import Parameters


@dataclass(frozen=True)
class Work:
    """Of a step in which every episode takes all its turns, and every prompt and response is as long as allowed.

    Attributes:
        scoring, update: operations, critic and reference included.
    """

    episodes: int
    turns: int
    tokens: int
    scoring: float
    update: float

    @classmethod
    def of(cls, config: TrainConfig, parameters: Parameters) -> Work:
        rollout, algorithm = config.rollout, config.algorithm
        width = rollout.max_prompt_tokens + rollout.max_response_tokens
        episodes = algorithm.groups * algorithm.group_size
        turns = suite_class(config.env.name).turn_limit(config.env)
        samples = episodes * turns
        head = parameters.head[0] * parameters.head[1]
        in_layers = parameters.linear.total - parameters.outside_decoder
        forward = samples * width * (2 * in_layers + 4 * width * parameters.attention_width)
        responses = samples * rollout.max_response_tokens
        has_critic = algorithm.name == "ppo"
        has_reference = bool(config.loss.kl_coeff or algorithm.kl_reward_coeff)
        passes = 4 if config.model.gradient_checkpointing else 3
        scored = 1 + has_reference
        return cls(
            episodes,
            turns,
            samples * width,
            (scored + has_critic) * forward + scored * 2 * head * responses,
            passes * forward * (config.optim.epochs + (config.critic.epochs if has_critic else 0))
            + 6 * head * responses * config.optim.epochs,
        )
