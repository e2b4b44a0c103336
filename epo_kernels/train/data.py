"""What travels through a training step: episodes of turns, and batches of turns as tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from epo_kernels.train.envs import Observation, Task


class Draw(IntEnum):
    """What a random draw is for: the second part of every seed, so that no two purposes share a stream."""

    PANEL = 0
    EPISODE = 1
    TASKS = 2
    MINIBATCHES = 3
    CLONING = 4


@dataclass
class Turn:
    """One action: what was seen, the token ids that went into the model and came out, what it brought."""

    observation: Observation
    prompt_ids: list[int]
    response_ids: list[int]  # as sampled, with the token that ended it
    log_probs: list[float]  # of response_ids when sampled, at the sampling temperature
    action: str
    reward: float = 0.0
    valid: bool = False
    result: str = ""  # the environment's answer


@dataclass
class Episode:
    task: Task
    group: int  # episodes of one group share their task
    seed: tuple[int, int, int, int]  # of the episode's draws: run, Draw, step or panel, index
    greedy: bool = False
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0
    success: bool = False
    official_success: bool = False
    finish: str = ""  # done | max_turns | the reason of a failure
    failed: bool = False  # lost to its environment, not to the policy

    @property
    def total_reward(self) -> float:
        return sum(turn.reward for turn in self.turns)


@dataclass
class Sample:
    """One turn as a training example."""

    prompt_ids: list[int]
    response_ids: list[int]
    turn: int  # its number in the episode, from 0
    advantage: float = 0.0
    old_log_probs: Tensor | None = None  # (len(response_ids),) float32
    ref_log_probs: Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class MiniBatch:
    """B samples: prompts padded on the left, responses on the right, so that responses share their first column.

    The last column of the padded tokens predicts nothing and is left out of `input_ids`.
    """

    input_ids: Tensor  # (B, P + R - 1) int64
    attention_mask: Tensor  # like input_ids, 0/1
    position_ids: Tensor  # like input_ids
    tokens: Tensor  # (B, R) int64: the responses
    mask: Tensor  # (B, R) bool
    turns: Tensor  # (B,) int64
    advantages: Tensor  # (B,) float32
    old_log_probs: Tensor | None  # (B, R) float32
    ref_log_probs: Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sample], pad_id: int, device: torch.device) -> "MiniBatch":
        prompt_width = max(len(sample.prompt_ids) for sample in samples)
        width = max(len(sample.response_ids) for sample in samples)
        ids = torch.full((len(samples), prompt_width + width), pad_id)
        seen = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            start, end = prompt_width - len(sample.prompt_ids), prompt_width + len(sample.response_ids)
            ids[row, start:end] = torch.tensor(sample.prompt_ids + sample.response_ids)
            seen[row, start:end] = 1
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        return cls(
            input_ids=ids[:, :-1].to(device),
            attention_mask=seen[:, :-1].to(device),
            position_ids=positions[:, :-1].to(device),
            tokens=ids[:, prompt_width:].to(device),
            mask=seen[:, prompt_width:].bool().to(device),
            turns=torch.tensor([sample.turn for sample in samples], device=device),
            advantages=torch.tensor([sample.advantage for sample in samples], device=device),
            old_log_probs=_padded([sample.old_log_probs for sample in samples], device),
            ref_log_probs=_padded([sample.ref_log_probs for sample in samples], device),
        )


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[int]]:
    """Indices of samples, alike in length, in batches of at most `max_tokens` padded tokens (or one sample)."""
    batch: list[int] = []
    prompt_width = width = 0
    for index in sorted(range(len(samples)), key=lambda i: (samples[i].length, i)):
        prompt_width = max(prompt_width, len(samples[index].prompt_ids))
        width = max(width, len(samples[index].response_ids))
        if batch and (len(batch) + 1) * (prompt_width + width) > max_tokens:
            yield batch
            batch = []
            prompt_width, width = len(samples[index].prompt_ids), len(samples[index].response_ids)
        batch.append(index)
    if batch:
        yield batch


def _padded(rows: list[Tensor | None], device: torch.device) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if len(present) < len(rows):
        return None
    return torch.nn.utils.rnn.pad_sequence(present, batch_first=True).to(device)
