"""The transformers engine: a batch of prompts in, sampled token ids with their log-probs out.

Equal prompts are processed once and share their KV cache: a group's episodes start alike, and many coincide later.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epo_kernels.train.models.chat import THOUGHT_END
from epo_kernels.train.models.policy import casts_kept
from epo_kernels.train.rollout.prompts import without_thought

CLOSING_TAG = "</action>"


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    seed: tuple[int, ...]  # determines the draws, independently of the rest of the batch
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # including the token that ended it, unless it reached the limit
    log_probs: list[float]  # of each token, under softmax(logits / temperature)
    finish: str = "length"  # stop: at an end token | length: at the limit


class Engine(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """Accepts requests at any time and returns each completion as soon as it is finished."""

    def awake(self) -> AbstractContextManager[None]:
        """Inside the context, it samples with the policy's current weights. Unfinished requests are dropped on exit."""
        ...

    def submit(self, requests: Mapping[int, Request]) -> None:
        """Add requests, each under an unused number."""
        ...

    def advance(self) -> list[tuple[int, Completion]]:
        """Generate further for all active requests; returns the completed ones by number."""
        ...


class StopRule:
    """When a response ends: at an end token; plain: at a line break; think_action: at the closing tag.

    If the policy can think, according to its tokenizer or chat template, a plain response ends with the line after its
    thought.

    Args:
        opening: the part of the response that the prompt contains, see `Chat`.

    Attributes:
        end_ids: tokens that end a response at any position.
        closing_tag: text that also ends it; None: no such text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: set[int], response_format: str, opening: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._opening = opening
        self.end_ids = set(end_ids)
        self.closing_tag = CLOSING_TAG if response_format == "think_action" else None
        self._maybe_closing: set[int] = set()
        self._line_breaks: set[int] = set()
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        if response_format == "plain":
            breaks = {i for i, text in enumerate(texts) if "\n" in text}
            if THOUGHT_END in texts or THOUGHT_END in str(tokenizer.chat_template):
                self._line_breaks = breaks
            else:
                self.end_ids |= breaks
        else:
            self._maybe_closing = {i for i, text in enumerate(texts) if ">" in text}

    def ends(self, token_ids: list[int]) -> bool:
        """Whether the response, given from its first token, ends with its last."""
        last = token_ids[-1]
        if last in self.end_ids:
            return True
        if last in self._line_breaks:
            return "\n" in without_thought(self._opening + str(self._tokenizer.decode(token_ids)))
        # Ten tokens contain the tag under any tokenization, even letter by letter.
        return last in self._maybe_closing and CLOSING_TAG in self._tokenizer.decode(token_ids[-10:])

    def length(self, token_ids: list[int]) -> int:
        """Number of tokens that belong to the response: up to the first that ends it, or all."""
        ends = (n for n in range(1, len(token_ids) + 1) if self.ends(token_ids[:n]))
        return next(ends, len(token_ids))


@dataclass
class TransformersEngine:
    """Samples with the training model itself: left-padded prompts, KV cache, one uniform draw per token."""

    model: PreTrainedModel  # its mode is not changed
    pad_id: int  # any valid token; padding is masked
    stop: StopRule
    temperature: float
    max_tokens: int  # response limit

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if not requests:
            return []
        with casts_kept(self.model):
            return self._generate(requests)

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        device = self.model.device
        draws = torch.from_numpy(
            np.stack([np.random.default_rng(r.seed).random(self.max_tokens) for r in requests])
        ).to(device)
        greedy = torch.tensor([r.greedy for r in requests], device=device)
        prompt_of, prompts = _distinct([r.prompt_ids for r in requests])
        input_ids, seen, position = (part.to(device) for part in self._pad(prompts))
        completions = [Completion([], []) for _ in requests]
        rows = list(range(len(requests)))  # request of each row still in the batch
        live = set(rows)
        cache = None
        for length in range(self.max_tokens):
            output = self.model(
                input_ids=input_ids,
                attention_mask=seen,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = output.past_key_values, output.logits[:, -1]
            if length == 0 and len(prompts) < len(requests):
                spread = torch.tensor(prompt_of, device=device)
                cache.batch_select_indices(spread)
                logits, position, seen = logits[spread], position[spread], seen[spread]
            log_probs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
            tokens = _choose(log_probs, draws[rows, length], greedy[rows])
            chosen = log_probs.gather(1, tokens[:, None])[:, 0]
            for row, token, log_prob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
                if row in live:
                    completions[row].token_ids.append(token)
                    completions[row].log_probs.append(log_prob)
                    if self.stop.ends(completions[row].token_ids):
                        live.discard(row)
            if not live:
                break
            input_ids, position = tokens[:, None], position[:, -1:] + 1
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            if len(live) <= len(rows) // 2:  # finished rows cost as much as live ones
                kept = torch.tensor([i for i, row in enumerate(rows) if row in live], device=device)
                cache.batch_select_indices(kept)
                input_ids, position, seen = input_ids[kept], position[kept], seen[kept]
                rows = [row for row in rows if row in live]
        return [
            completion if row in live else replace(completion, finish="stop")
            for row, completion in enumerate(completions)
        ]

    def _pad(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded ids, attention mask and positions, each (B, P)."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids, seen, (seen.cumsum(1) - 1).clamp(min=0)


def _distinct(prompts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """(index of each prompt among the distinct ones, the distinct ones in order of appearance)."""
    places: dict[tuple[int, ...], int] = {}
    indices = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return indices, [list(prompt) for prompt in places]


def _choose(log_probs: Tensor, draws: Tensor, greedy: Tensor) -> Tensor:
    """(B,) tokens: the most likely, or where a uniform draw falls in the cumulative distribution (float64)."""
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    target = draws[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=log_probs.shape[-1] - 1)
    return torch.where(greedy, log_probs.argmax(dim=-1), sampled)
