"""What a training step tells of itself, under the names people know from verl and verl-agent."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.train.advantages import GroupAdvantages
from epo_kernels.train.data import Episode, Sample
from epo_kernels.train.tracking import Value


def entropy_metrics(turns: Tensor, entropy: Tensor, history: ek.EntropyHistory) -> dict[str, Value]:
    """Entropy of the tokens just sampled, over all and by turn (null: nobody got that far), and the history's means."""
    sums = torch.zeros(int(turns.max()) + 1, dtype=torch.float64).index_add_(0, turns, entropy.double())
    counts = torch.bincount(turns)
    return {
        "actor/entropy": float(entropy.double().mean()),
        "epo/entropy_by_turn": _list(sums / counts),
        "epo/history_by_turn": _list(history.means()[: len(counts)]),
    }


def episode_metrics(
    episodes: Sequence[Episode], played: Sequence[Episode], advantages: GroupAdvantages
) -> dict[str, Value]:
    rewards = [episode.total_reward for episode in played]
    lengths = [len(episode.turns) for episode in played]
    turns = [turn for episode in played for turn in episode.turns]
    return {
        "critic/rewards/mean": _mean(rewards),  # as verl names an episode's return, with or without a critic
        "critic/rewards/max": max(rewards),
        "critic/rewards/min": min(rewards),
        "critic/score/mean": _mean([episode.score for episode in played]),
        "critic/advantages/mean": float(advantages.values.mean()),
        "critic/advantages/max": float(advantages.values.max()),
        "critic/advantages/min": float(advantages.values.min()),
        "episode/reward/mean": _mean(rewards),
        "episode/reward/max": max(rewards),
        "episode/reward/min": min(rewards),
        "episode/score/mean": _mean([episode.score for episode in played]),
        "episode/success_rate": _mean([episode.success for episode in played]),
        "episode/official_success_rate": _mean([episode.official_success for episode in played]),
        "episode/length/mean": _mean(lengths),
        "episode/valid_action_ratio": _mean([turn.valid for turn in turns]),
        "episode/failed": len(episodes) - len(played),
        "episode/groups_without_variance": advantages.uniform_groups,
        "episode/groups": advantages.groups,
    }


def token_metrics(played: Sequence[Episode], samples: Sequence[Sample], limit: int) -> dict[str, Value]:
    responses = [len(sample.response_ids) for sample in samples]
    prompts = [len(sample.prompt_ids) for sample in samples]
    sampled = torch.tensor([p for episode in played for turn in episode.turns for p in turn.log_probs])
    scored = torch.cat([sample.old_log_probs for sample in samples if sample.old_log_probs is not None])
    gap = (sampled.exp() - scored.exp()).abs()
    return {
        "response_length/mean": _mean(responses),
        "response_length/max": max(responses),
        "response_length/clip_ratio": _mean([length >= limit for length in responses]),
        "prompt_length/mean": _mean(prompts),
        "prompt_length/max": max(prompts),
        "training/rollout_probs_diff_mean": float(gap.mean()),
        "training/rollout_probs_diff_max": float(gap.max()),
        "perf/total_num_tokens": sum(prompts) + sum(responses),
    }


def _list(values: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
