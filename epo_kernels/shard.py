"""A vocabulary split over the ranks of a process group: each rank's share, and what is exchanged among them.

Rank r holds the columns that follow those of rank r - 1. Everything known of the tokens is the same on every rank; the
logits (or the head's rows that make them) are a part.

One collective opens a call: a few integers a rank, by which ranks know each other's shares and that they were called
alike. It is read on the host, a sync on CUDA; if ranks disagree, every rank raises instead of waiting for ever.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from epo_kernels.autograd import differentiable_once

_RECORD = 24  # integers that ranks compare, at most: one length, whatever each of them was called with


@dataclass(frozen=True)
class Shard:
    """This rank's share of a vocabulary.

    Attributes:
        group: the ranks that hold the vocabulary together.
        rank: this one's place in it.
        widths: columns of each rank, padding included.
        device: where the logits are.
    """

    group: dist.ProcessGroup
    rank: int
    widths: tuple[int, ...]
    device: torch.device

    @property
    def total(self) -> int:
        """Columns of all ranks."""
        return sum(self.widths)

    @property
    def columns(self) -> slice:
        """Those of this rank."""
        start = sum(self.widths[: self.rank])
        return slice(start, start + self.widths[self.rank])

    def own_vocabulary(self, vocab_size: int) -> int:
        """How many of this rank's columns are of the vocabulary; the rest is padding."""
        columns = self.columns
        return max(min(vocab_size, columns.stop) - columns.start, 0)

    @cached_property
    def ends(self) -> Tensor:
        """(ranks,) int64: where each rank's columns end."""
        return torch.tensor(list(accumulate(self.widths)), device=self.device)

    def gather(self, values: Tensor) -> Tensor:
        """(...) of one shape on every rank -> (ranks, ...)."""
        return gather(values, self.group)


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) of one shape on every rank -> (ranks, ...), in the order of the ranks."""
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
    return gathered


def find_shard(
    group: dist.ProcessGroup, device: torch.device, width: int, mask: Tensor | None, **facts: object
) -> Shard:
    """Exchange the widths of the ranks' shares.

    Args:
        width: columns of this rank.
        mask: of the tokens, on the device of the logits; None counts all of them.
        facts: what else the ranks must agree on, by the name that an error gives it; first what tells which there are.

    Raises:
        RuntimeError: a graph is being compiled.
        TypeError: group isn't a process group with this process in it.
        ValueError: the ranks disagree, which raises on all of them.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "group= can't be compiled: its collectives overlap with the products, which a traced graph has no word "
            "for; call the loss outside of torch.compile (torch.compiler.disable)"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group with this rank in it, got {group!r} "
            f"({type(group).__name__})"
        )
    words = {name: repr(fact) for name, fact in facts.items() if not isinstance(fact, Integral)}
    numbers = [
        int(fact) if isinstance(fact, Integral) else zlib.crc32(words[name].encode()) for name, fact in facts.items()
    ]
    record = torch.tensor([width, 0, *numbers, *[0] * (_RECORD - len(numbers))], device=device)
    if mask is not None:
        record[1] = torch.count_nonzero(mask)
    widths, counted, *known = gather(record, group).t().tolist()
    for name, values in [*zip(facts, known, strict=False), ("number of counted tokens", counted)]:
        if len(set(values)) > 1:
            others = f"this one has {words[name]}" if name in words else f"they have {values}"
            raise ValueError(f"every rank of group must be called with the same {name.replace('_', ' ')}; {others}")
    if sum(widths) == 0:
        raise ValueError("the ranks of group must hold at least one column of the vocabulary, they have none")
    return Shard(group, dist.get_rank(group), tuple(widths), device)


def check_replicated(shard: Shard, mask: Tensor, **arguments: object) -> None:
    """With EPO_KERNELS_CHECK=1, raise on every rank unless tensor arguments are the same on all, bit for bit.

    (B, T, ...) ones only where the mask (B, T) is 1; others are compared whole.

    Raises:
        ValueError: naming the argument.
    """
    if os.environ.get("EPO_KERNELS_CHECK", "0") != "1":
        return
    given = {name: value for name, value in {**arguments, "mask": mask}.items() if isinstance(value, Tensor)}
    prints = torch.zeros(_RECORD, dtype=torch.int64, device=shard.device)
    prints[0] = zlib.crc32(repr(list(given)).encode())
    for place, (name, value) in enumerate(given.items(), 1):
        prints[place] = _fingerprint(value if name == "mask" or value.shape[:2] != mask.shape else value[mask])
    names = "what is given of the optional arguments", *given
    for name, values in zip(names, shard.gather(prints).t().tolist(), strict=False):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} must be the same on every rank of group, bit for bit where the mask is 1; it differs. Only "
                "the vocabulary is split over group: broadcast it, or leave group out for data-parallel ranks"
            )


def _fingerprint(values: Tensor) -> Tensor:
    """0-d int64 of the values' bits and places."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(integers).flatten().to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return (bits * (places * 0x9E3779B97F4A7C1 + 1)).sum()


class GatheredColumns(torch.autograd.Function):
    """A rank's columns (..., width) -> those of all ranks, (..., total), and an anchor.

    The gradient of what is the same on all ranks is so too: each takes its columns.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        ctx.columns = shard.columns
        anchor = columns.new_empty(0)
        ctx.save_for_backward(anchor)
        ctx.set_materialize_grads(False)
        widest = max(shard.widths)
        padded = torch.nn.functional.pad(columns, (0, widest - columns.shape[-1]))
        parts = zip(shard.gather(padded).unbind(), shard.widths, strict=True)
        return torch.cat([part[..., :width] for part, width in parts], dim=-1), anchor

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        return gradient[..., ctx.columns], None


class ReplicatedInput(torch.autograd.Function):
    """What is the same on all ranks, and enters a product with a rank's columns, and an anchor.

    The ranks' gradients are added up.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        ctx.group = shard.group
        anchor = values.new_empty(0)
        ctx.save_for_backward(anchor)
        ctx.set_materialize_grads(False)
        return values.view_as(values), anchor

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None
