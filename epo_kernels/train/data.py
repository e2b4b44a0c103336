"""What travels through a training step: episodes of turns, and batches of turns as tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.packing import lay_out, pack, visibility

ENVIRONMENT = -1  # in place of a turn's number, where the policy didn't write


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
    response: str = ""  # response_ids as text, without the token that ended it
    finish: str = ""  # why the response ended: stop | length, at rollout.max_response_tokens


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
    """A training example: a turn, or several turns of an episode in the one sequence that the policy saw them as.

    R tokens follow the prompt. Each of them has its turn, and ENVIRONMENT where the policy didn't write it. Tensors are
    (R,) float32 on the CPU; where the turn is ENVIRONMENT nothing in them counts.
    """

    prompt_ids: list[int]
    response_ids: list[int]  # R: from the first sampled token on
    turns: list[int]  # R
    episode: int = 0  # its number among those played
    rollout_log_probs: Tensor | None = None  # as the engine told when it sampled
    old_log_probs: Tensor | None = None  # as the learner computes them with the same weights
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_weights: Tensor | None = None  # factor of the policy loss; None: 1
    values: Tensor | None = None  # the critic's, of the state before each token
    advantages: Tensor | None = None
    returns: Tensor | None = None  # what the critic learns

    @classmethod
    def of_turn(cls, prompt_ids: list[int], response_ids: list[int], turn: int, advantage: float = 0.0) -> "Sample":
        """One turn, with the same advantage for each of its tokens."""
        width = len(response_ids)
        return cls(prompt_ids, response_ids, [turn] * width, advantages=torch.full((width,), advantage))

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def mask(self) -> Tensor:
        """(R,) bool: what the policy wrote."""
        return torch.tensor(self.turns) != ENVIRONMENT

    @property
    def num_sampled(self) -> int:
        return len(self.turns) - self.turns.count(ENVIRONMENT)


def samples_of(episodes: Sequence[Episode], layout: str) -> list[Sample]:
    """Training examples of episodes, in order.

    Args:
        layout: "turn": each turn on its own. "episode": turns whose prompt is the whole sequence before it and
            something more share one sequence; where a prompt window moved on, another sequence begins.
    """
    samples = []
    for number, episode in enumerate(episodes):
        runs: list[list[int]] = []
        for index, turn in enumerate(episode.turns):
            if layout == "episode" and runs and _continues(episode.turns[index - 1], turn):
                runs[-1].append(index)
            else:
                runs.append([index])
        samples += [_sample_of(episode.turns, run, number) for run in runs]
    return samples


def _continues(before: Turn, turn: Turn) -> bool:
    seen = before.prompt_ids + before.response_ids
    return turn.prompt_ids[: len(seen)] == seen


def _sample_of(turns: Sequence[Turn], run: Sequence[int], episode: int) -> Sample:
    prompt_ids = turns[run[0]].prompt_ids
    ids: list[int] = []
    numbers: list[int] = []
    log_probs: list[float] = []
    for index in run:
        turn = turns[index]
        answer = turn.prompt_ids[len(prompt_ids) + len(ids) :]
        ids += answer + turn.response_ids
        numbers += [ENVIRONMENT] * len(answer) + [index] * len(turn.response_ids)
        log_probs += [0.0] * len(answer) + turn.log_probs
    return Sample(prompt_ids, ids, numbers, episode, rollout_log_probs=torch.tensor(log_probs))


@dataclass
class MiniBatch:
    """B samples as rows of tokens for the model, and their R response tokens, padded on the right.

    A row holds one sample, or several behind each other (`epo_kernels.train.packing`); then samples of a row with the
    same prompt share it. The last token of a sample predicts nothing and is left out of the rows. What a sample doesn't
    have is None.
    """

    input_ids: Tensor  # (rows, W) int64
    attention_mask: Tensor  # like input_ids, 0/1; packed: (rows, 1, W, W) bool, who sees whom
    position_ids: Tensor  # like input_ids: within the sample
    places: Tensor  # (B, R) int64: where in the flattened rows the token before each response token lies
    tokens: Tensor  # (B, R) int64: the responses
    mask: Tensor  # (B, R) bool: sampled by the policy
    turns: Tensor  # (B, R) int64, ENVIRONMENT where the mask is False
    num_sampled: int  # tokens whose mask is True
    num_padding: int  # tokens of the rows that belong to no sample
    advantages: Tensor | None  # (B, R) float32, as are the others
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    values: Tensor | None
    returns: Tensor | None

    @classmethod
    def of(
        cls, samples: Sequence[Sample], pad_id: int, device: torch.device, row_width: int | None = None
    ) -> "MiniBatch":
        """A batch of samples, packed into rows of `row_width` tokens in their order; None: a row each."""
        rows = lay_out([(sample.prompt_ids, sample.response_ids) for sample in samples], row_width)
        ids = _rows_of([row.ids for row in rows], pad_id)
        width = ids.shape[1]
        seen = _rows_of([[1] * len(row.ids) for row in rows], 0)
        turns = _rows_of([sample.turns for sample in samples], ENVIRONMENT)
        places = [[number * width + place for place in own] for number, row in enumerate(rows) for own in row.places]
        return cls(
            input_ids=ids.to(device),
            attention_mask=(seen if row_width is None else visibility(rows, width)).to(device),
            position_ids=_rows_of([row.positions for row in rows], 0).to(device),
            places=_rows_of(places, 0).to(device),
            tokens=_rows_of([sample.response_ids for sample in samples], pad_id).to(device),
            mask=(turns != ENVIRONMENT).to(device),
            turns=turns.to(device),
            num_sampled=sum(sample.num_sampled for sample in samples),
            num_padding=seen.numel() - int(seen.sum()),
            advantages=_padded([sample.advantages for sample in samples], device),
            old_log_probs=_padded([sample.old_log_probs for sample in samples], device),
            ref_log_probs=_padded([sample.ref_log_probs for sample in samples], device),
            is_weights=_padded([sample.is_weights for sample in samples], device),
            values=_padded([sample.values for sample in samples], device),
            returns=_padded([sample.returns for sample in samples], device),
        )


def micro_batches(samples: Sequence[Sample], max_tokens: int, row_width: int | None = None) -> Iterator[list[int]]:
    """Indices of samples in batches whose rows have at most `max_tokens` tokens, padding included (or one row).

    Args:
        row_width: rows are packed up to this many tokens; None: each sample has a row, with others alike in length.
    """
    if row_width is None:
        rows = [[index] for index in sorted(range(len(samples)), key=lambda i: (samples[i].length, i))]
        widths = [samples[index].length - 1 for (index,) in rows]
    else:
        rows = pack([(sample.prompt_ids, sample.response_ids) for sample in samples], row_width)
        widths = [row_width] * len(rows)
    batch: list[list[int]] = []
    for row, width in zip(rows, widths, strict=True):  # no width is less than one before
        if batch and (len(batch) + 1) * width > max_tokens:
            yield [index for indices in batch for index in indices]
            batch = []
        batch.append(row)
    if batch:
        yield [index for indices in batch for index in indices]


def _rows_of(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(len(rows), longest) int64, padded on the right."""
    table = torch.full((len(rows), max(map(len, rows))), fill)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table


def _padded(rows: list[Tensor | None], device: torch.device) -> Tensor | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if len(present) < len(rows):
        raise ValueError(f"{len(present)} of {len(rows)} samples have what all of them or none must have")
    return torch.nn.utils.rnn.pad_sequence(present, batch_first=True).to(device)
