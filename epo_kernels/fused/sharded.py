"""A vocabulary split over the ranks of a process group: rank r holds the columns that follow those of rank r - 1.

Hidden states and everything known of the tokens are the same on every rank, the logits (or the head's rows that make
them) are a part. Per chunk of tokens, two collectives:

1. *Statistics*, all-gathered. Every rank reads its own columns, and sends its maximum, sum, entropy and the sampled
   token's log-prob: 16 bytes a token. Sums only add up about a common maximum, so that all-reducing them would take two
   rounds, one after the other; gathered, one is enough, and less than one can't be, since every column's gradient needs
   the whole row. All ranks merge the same numbers in the order of the ranks (`reference.merge_statistics`), so whatever
   follows is the same on each to the last bit: log-probs, entropies, loss, and both derivatives of every token.
2. *∂hidden*, all-reduced in float32, while the next chunk's logits are computed. It is a sum over the whole vocabulary;
   ∂weight, ∂bias and ∂logits are a rank's own.

One more collective opens a call: a few integers a rank, by which ranks know each other's shares and that they were
called alike. It is read on the host, a sync on CUDA; ranks that disagree all raise, where they would wait for ever.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from epo_kernels import reference
from epo_kernels.autograd import differentiable_once
from epo_kernels.declaration import COEFFICIENTS, ROW_SUMS
from epo_kernels.fused.rows import (
    Prepared,
    RowKernels,
    RowLoss,
    Rows,
    RowStatistics,
    Terms,
    Weighing,
)
from epo_kernels.inputs import Coefficients, LogitTransform, Scalar, TokenInputs, compute_dtype

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


def check_replicated(shard: Shard | None, mask: Tensor, /, **arguments: object) -> None:
    """With EPO_KERNELS_CHECK=1, raise on every rank unless tensor arguments are the same on all, bit for bit.

    (B, T, ...) ones only where the mask (B, T) is 1; others are compared whole.

    Raises:
        ValueError: naming the argument.
    """
    if shard is None or os.environ.get("EPO_KERNELS_CHECK", "0") != "1":
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


class ShardedRows:
    """`RowKernels` over a rank's columns of the rows: results are those of the whole rows.

    rows.transform and rows.tokens are the whole vocabulary's; `out` has the columns of `rows.logits`.
    """

    def __init__(self, kernels: RowKernels, shard: Shard) -> None:
        self._kernels, self._shard = kernels, shard

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        shard, transform = self._shard, rows.transform
        own = self._own_columns(rows)
        if own is not None:
            part = self._kernels.statistics(own, entropy=entropy)
        else:  # padding alone
            nothing = torch.zeros_like(rows.tokens, dtype=compute_dtype(rows.logits.dtype))
            part = RowStatistics(nothing, nothing if entropy else None, nothing - torch.inf, nothing)
        parts = shard.gather(torch.stack([value for value in part if value is not None]))
        log_probs, *entropies, maximum, total = parts.unbind(dim=1)
        inside = (rows.tokens >= 0) & (rows.tokens < transform.vocab_size)
        owner = torch.where(inside, torch.bucketize(rows.tokens, shard.ends, right=True), -1)
        whole = reference.merge_statistics(
            log_probs, entropies[0] if entropy else None, maximum, total, self.rate(transform), owner
        )
        at_mask = (None if value is None else torch.where(rows.mask, value, 0.0) for value in whole)
        return RowStatistics(*at_mask)  # type: ignore[arg-type]

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        own = self._own_columns(rows)
        if own is None:
            out.zero_()
        else:
            self._kernels.gradient(own, statistics, grad_log_probs, grad_entropy, out)

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        statistics = self.statistics(rows, entropy=True)
        result, grad_log_probs, grad_entropy = loss_of_rows(rows, statistics, terms)
        if out is not None:
            self.gradient(rows, statistics, grad_log_probs, grad_entropy, out)
        return result

    def prepare(self, mask: Tensor, weighing: Weighing, coefficients: tuple[Scalar, ...]) -> Prepared:
        return self._kernels.prepare(mask, weighing, coefficients)

    def rate(self, transform: LogitTransform) -> Scalar:
        return self._kernels.rate(transform)

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        self._kernels.scale(gradient, factor)

    def _own_columns(self, rows: Rows) -> Rows | None:
        """The rows as this rank has them; None where all of it is padding. Tokens of other ranks are out of range."""
        vocab_size = self._shard.own_vocabulary(rows.transform.vocab_size)
        if vocab_size < 1:
            return None
        transform = replace(rows.transform, vocab_size=vocab_size)
        return Rows(rows.logits, rows.tokens - self._shard.columns.start, rows.mask, transform)


def loss_of_rows(rows: Rows, statistics: RowStatistics, terms: Terms) -> tuple[RowLoss, Tensor, Tensor]:
    """`RowKernels.loss` from statistics on, and its derivatives (B, T) in log-prob and entropy. No sync."""
    assert statistics.entropy is not None
    given = dict(zip(COEFFICIENTS, terms.coefficients.unbind(), strict=True))
    coefficients = Coefficients(given["entropy_coeff"], given["penalty_coeff"], given["kl_coeff"], None, 1.0)
    policy_loss, _, divergence = terms.policy_loss.partition("_")
    settings = SimpleNamespace(  # `reference.LossSettings` of one call, in tensors
        **given,
        policy_loss=policy_loss,
        dppo_divergence=divergence,
        penalty=terms.penalty,
        kl_type=terms.kl_type,
        kl_bias_correction=False,
        band_scope="token",
        ratio_unit="token",
    )
    inputs = TokenInputs(
        shape=rows.tokens.shape,
        tokens=rows.tokens,
        mask=rows.mask,
        old_log_probs=terms.old_log_probs,
        advantages=terms.advantages,
        ref_log_probs=terms.ref_log_probs,
        is_weights=terms.is_weights,
        lower=terms.lower,
        upper=terms.upper,
        segment_ids=None,
        num_segments=0,
        sequence_ids=None,
        num_sequences=rows.tokens.shape[0],
        max_length=None,
    )
    with torch.enable_grad():
        log_probs, entropy = (value.detach().requires_grad_() for value in (statistics.log_probs, statistics.entropy))
        losses = reference.token_losses(log_probs, entropy, inputs, coefficients, settings)
        total = torch.where(rows.mask, losses.total, 0.0).mul(terms.weights).sum()
    d_log_probs, d_entropy = torch.autograd.grad(total, (log_probs, entropy), materialize_grads=True)
    sums = reference.row_sums(
        log_probs.detach(), entropy.detach(), terms.weights, losses, inputs, rows.transform.vocab_size
    )
    packed = torch.stack([sums[name] for name in ROW_SUMS])
    loss = sums["loss"].to(terms.weights.dtype)
    return RowLoss(statistics.log_probs, statistics.entropy, packed, loss), d_log_probs, d_entropy


class PartialSums:
    """Partial sums of ∂hidden, made whole by one all-reduce a chunk, each on its way while the next is computed."""

    def __init__(self, shard: Shard) -> None:
        self._group = shard.group
        self._pending: tuple[Any, Tensor, dist.Work] | None = None

    def exchange(self, place: Any, part: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Send a part off, which is overwritten; yields what was sent before, (its place, its sum)."""
        before, self._pending = self._pending, (place, part, dist.all_reduce(part, group=self._group, async_op=True))
        return self._received(before)

    def finish(self) -> Iterator[tuple[Any, Tensor]]:
        """Yields what is still on its way."""
        before, self._pending = self._pending, None
        return self._received(before)

    @staticmethod
    def _received(sent: tuple[Any, Tensor, dist.Work] | None) -> Iterator[tuple[Any, Tensor]]:
        if sent is not None:
            place, total, work = sent
            work.wait()
            yield place, total


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
