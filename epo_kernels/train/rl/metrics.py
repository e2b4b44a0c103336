"""The metrics of a training step, under the names used by verl and verl-agent."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.train.data import ENVIRONMENT, Episode, Sample
from epo_kernels.train.io.tracking import Value
from epo_kernels.train.io.watch import repeated_share


def entropy_metrics(turns: Tensor, entropy: Tensor, history: ek.EntropyHistory) -> dict[str, Value]:
    """Entropy of the sampled tokens, overall and by turn (null: no episode got that far), and the history's means."""
    sums = torch.zeros(int(turns.max()) + 1, dtype=torch.float64).index_add_(0, turns, entropy.double())
    counts = torch.bincount(turns)
    return {
        "actor/entropy": float(entropy.double().mean()),
        "epo/entropy_by_turn": _list(sums / counts),
        "epo/history_by_turn": _list(history.means()[: len(counts)]),
    }


def sampled_entropy(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(turns, entropies) of all generated tokens, (N,) each."""
    turns = torch.cat([torch.tensor(sample.turns)[sample.mask] for sample in samples])
    return turns, torch.cat([sample.entropy[sample.mask] for sample in samples if sample.entropy is not None])


def episode_metrics(episodes: Sequence[Episode], played: Sequence[Episode]) -> dict[str, Value]:
    """Metrics of all played episodes, whether or not they are used for learning."""
    rewards = [episode.total_reward for episode in played]
    lengths = [len(episode.turns) for episode in played]
    turns = [turn for episode in played for turn in episode.turns]
    return {
        "critic/rewards/mean": _mean(rewards),  # verl's name for the episode return, with or without a critic
        "critic/rewards/max": max(rewards),
        "critic/rewards/min": min(rewards),
        "critic/score/mean": _mean([episode.score for episode in played]),
        "episode/reward/mean": _mean(rewards),
        "episode/reward/max": max(rewards),
        "episode/reward/min": min(rewards),
        "episode/reward/std": float(np.std(rewards)),
        "episode/score/mean": _mean([episode.score for episode in played]),
        "episode/success_rate": _mean([episode.success for episode in played]),
        "episode/official_success_rate": _mean([episode.official_success for episode in played]),
        "episode/length/mean": _mean(lengths),
        "episode/valid_action_ratio": _mean([turn.valid for turn in turns]),
        "episode/played": len(played),
        "episode/failed": len(episodes) - len(played),
    }


def token_metrics(samples: Sequence[Sample], limit: int) -> dict[str, Value]:
    """Metrics of all samples, before truncated responses are masked; response lengths are per turn."""
    turns = [response for sample in samples for response in _responses(sample)]
    responses = [len(response) for response in turns]
    prompts = [len(sample.prompt_ids) for sample in samples]
    return {
        "response_length/mean": _mean(responses),
        "response_length/max": max(responses),
        "response_length/clip_ratio": _mean([length >= limit for length in responses]),
        "response/repeated_token_share": repeated_share(turns),
        "prompt_length/mean": _mean(prompts),
        "prompt_length/max": max(prompts),
        "perf/total_num_tokens": sum(sample.length for sample in samples),
    }


def step_line(step: int, steps: int, metrics: Mapping[str, Value]) -> str:
    """A step's line in the log."""
    return (
        f"step {step}/{steps}: return {metrics['episode/reward/mean']:.3f}, "
        f"success {metrics['episode/success_rate']:.0%}, score {metrics['episode/score/mean']:.1f}, "
        f"turns {metrics['episode/length/mean']:.1f}, understood {metrics['episode/valid_action_ratio']:.0%}, "
        f"entropy {metrics['actor/entropy']:.3f}, "
        f"{metrics['timing_s/step']:.1f} s"
    )


def _responses(sample: Sample) -> list[list[int]]:
    """The token ids of each turn."""
    ids = zip(sample.turns, sample.response_ids, strict=True)
    return [[token for _, token in own] for turn, own in groupby(ids, itemgetter(0)) if turn != ENVIRONMENT]


def _list(values: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
