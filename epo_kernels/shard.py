"""A vocabulary split over the ranks of a process group: each rank's share, and the exchange between ranks.

Rank r has the columns that follow the columns of rank r - 1. All per-token arguments are the same on every rank; logits
(or the head's rows) are split.

Each call starts with one collective of a few integers per rank, by which ranks learn each other's shares and verify
that they were called with the same arguments. It is read on the host, which syncs on CUDA. If ranks disagree, every
rank raises instead of deadlocking.
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

_RECORD = 32  # maximum number of integers that ranks compare; a fixed length, whatever the arguments


@dataclass(frozen=True)
class Shard:
    """This rank's share of a vocabulary.

    Attributes:
        group: the ranks that share the vocabulary.
        rank: this rank's index in the group.
        widths: number of columns of each rank, including padding.
        device: device of the logits.
    """

    group: dist.ProcessGroup
    rank: int
    widths: tuple[int, ...]
    device: torch.device

    @property
    def total(self) -> int:
        """Number of columns over all ranks."""
        return sum(self.widths)

    @property
    def columns(self) -> slice:
        """The columns of this rank."""
        start = sum(self.widths[: self.rank])
        return slice(start, start + self.widths[self.rank])

    def own_vocabulary(self, vocab_size: int) -> int:
        """Number of this rank's columns that belong to the vocabulary; the rest is padding."""
        columns = self.columns
        return max(min(vocab_size, columns.stop) - columns.start, 0)

    @cached_property
    def ends(self) -> Tensor:
        """(ranks,) int64: the end of each rank's columns."""
        return torch.tensor(list(accumulate(self.widths)), device=self.device)

    def gather(self, values: Tensor) -> Tensor:
        """(...), the same shape on every rank -> (ranks, ...)."""
        return gather(values, self.group)


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...), the same shape on every rank -> (ranks, ...), in rank order."""
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
    return gathered


def find_shard(
    group: dist.ProcessGroup, device: torch.device, width: int, mask: Tensor | None, **facts: object
) -> Shard:
    """Exchange the widths of the ranks' shares.

    Args:
        width: number of columns of this rank.
        mask: token mask, on the device of the logits; None counts all tokens.
        facts: other values the ranks must agree on, keyed by the name used in errors. The first must identify the rest.

    Raises:
        RuntimeError: called while compiling a graph.
        TypeError: group is not a process group that includes this process.
        ValueError: the ranks disagree; raised on every rank.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "group= cannot be compiled: its collectives overlap with the matrix products, which a traced graph cannot "
            "express; call the loss outside torch.compile (torch.compiler.disable)"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group that includes this rank, got {group!r} "
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
            others = f"this rank has {words[name]}" if name in words else f"they have {values}"
            raise ValueError(f"every rank of group must use the same {name.replace('_', ' ')}; {others}")
    if sum(widths) == 0:
        raise ValueError("the ranks of group must hold at least one column of the vocabulary, they have none")
    return Shard(group, dist.get_rank(group), tuple(widths), device)


def check_replicated(shard: Shard, mask: Tensor, **arguments: object) -> None:
    """With EPO_KERNELS_CHECK=1, raise on every rank unless tensors and numbers are bit-identical across ranks.

    Arguments of shape (B, T, ...) are compared where the mask (B, T) is 1, others in full.

    Raises:
        ValueError: an argument differs; the message names it.
    """
    if os.environ.get("EPO_KERNELS_CHECK", "0") != "1":
        return
    given = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=shard.device)
        for name, value in {**arguments, "mask": mask}.items()
        if isinstance(value, (Tensor, int, float))
    }
    prints = torch.zeros(_RECORD, dtype=torch.int64, device=shard.device)
    prints[0] = zlib.crc32(repr(list(given)).encode())
    for place, (name, value) in enumerate(given.items(), 1):
        prints[place] = _fingerprint(value if name == "mask" or value.shape[:2] != mask.shape else value[mask])
    names = "set of optional arguments", *given
    for name, values in zip(names, shard.gather(prints).t().tolist(), strict=False):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} must be bit-identical on every rank of group where the mask is 1; it differs. Only the "
                "vocabulary is split over group: broadcast it, or omit group for data-parallel ranks"
            )


def _fingerprint(values: Tensor) -> Tensor:
    """0-d int64 hash of the values' bits and positions."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(integers).flatten().to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return (bits * (places * 0x9E3779B97F4A7C1 + 1)).sum()


class GatheredColumns(torch.autograd.Function):
    """A rank's columns (..., width) -> the columns of all ranks, (..., total), and an anchor.

    The gradient is the same on all ranks; each rank takes its columns.
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
    """A value replicated on all ranks that enters a product with a rank's columns, and an anchor.

    The gradients of the ranks are summed.
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
