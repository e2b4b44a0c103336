"""Rows of a vocabulary split over the ranks of a process group (`epo_kernels.shard`).

Hidden states and all per-token arguments are the same on every rank; logits (or the head's rows) are split. Each chunk
of tokens takes two collectives:

1. *Statistics*, all-gathered. Every rank reads its own columns and sends its maximum, sum, entropy and the sampled
   token's log-prob: 16 bytes per token. Sums can only be added relative to a common maximum, so an all-reduce would
   need two sequential rounds. One all-gather is enough, and is the minimum, because every column's gradient needs the
   whole row. All ranks merge the same numbers in rank order (`reference.merge_statistics`), so everything that follows
   is bit-identical on all of them: log-probs, entropies, loss, and both derivatives of every token. (Not quite on CUDA
   with statistics of segments or packed sequences, whose sums are atomic there.)
2. *∂hidden*, all-reduced in float32 while the next chunk's logits are computed. It is a sum over the whole vocabulary;
   ∂weight, ∂bias and ∂logits are local to a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from epo_kernels import reference
from epo_kernels.fused.rows import Rows, RowStatistics, Spread, StatisticsKernels
from epo_kernels.inputs import LogitTransform, Scalar, compute_dtype
from epo_kernels.shard import Shard


class ShardedRows:
    """`StatisticsKernels` over a rank's columns; the results are the statistics of the whole rows.

    rows.transform and rows.tokens refer to the whole vocabulary; `out` has the columns of `rows.logits`.
    """

    def __init__(self, kernels: StatisticsKernels, shard: Shard) -> None:
        self._kernels, self._shard = kernels, shard

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        shard, transform = self._shard, rows.transform
        own = self._own_columns(rows)
        if own is not None:
            part = self._kernels.statistics(own, entropy=entropy)
        else:  # only padding
            nothing = torch.zeros_like(rows.tokens, dtype=compute_dtype(rows.logits.dtype))
            part = RowStatistics(nothing, nothing if entropy else None, nothing - torch.inf, nothing)
        parts = shard.gather(torch.stack([value for value in part if value is not None]))
        log_probs, *entropies, maximum, total = parts.unbind(dim=1)
        in_vocabulary = (rows.tokens >= 0) & (rows.tokens < transform.vocab_size)
        owner = torch.bucketize(torch.where(in_vocabulary, rows.tokens, 0), shard.ends, right=True)
        whole = reference.merge_statistics(
            log_probs,
            entropies[0] if entropy else None,
            maximum,
            total,
            self.maximum_scale(transform),
            owner,
            in_vocabulary,
        )
        at_mask = (None if value is None else torch.where(rows.mask, value, 0.0) for value in whole)
        return RowStatistics(*at_mask)  # type: ignore[arg-type]

    def spread(self, rows: Rows, statistics: RowStatistics) -> Spread:
        own = self._own_columns(rows)
        nothing = torch.zeros_like(statistics.sum)
        part = Spread(nothing, nothing) if own is None else self._kernels.spread(own, statistics)
        return Spread(*self._shard.gather(torch.stack(part)).sum(dim=0))  # in the order of the ranks

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

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        return self._kernels.maximum_scale(transform)

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        self._kernels.scale(gradient, factor, out)

    def _own_columns(self, rows: Rows) -> Rows | None:
        """The rows as seen by this rank; None if it has only padding. Tokens of other ranks are out of range."""
        vocab_size = self._shard.own_vocabulary(rows.transform.vocab_size)
        if vocab_size < 1:
            return None
        transform = replace(rows.transform, vocab_size=vocab_size)
        return Rows(rows.logits, rows.tokens - self._shard.columns.start, rows.mask, transform)


class PartialSums:
    """Partial sums of ∂hidden, completed by one all-reduce per chunk that overlaps with the next chunk."""

    def __init__(self, shard: Shard) -> None:
        self._group = shard.group
        self._pending: tuple[Any, Tensor, dist.Work] | None = None

    def exchange(self, place: Any, part: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Start the all-reduce of a part, in place; yields the previous one as (its place, its sum)."""
        before, self._pending = self._pending, (place, part, dist.all_reduce(part, group=self._group, async_op=True))
        return self._received(before)

    def finish(self) -> Iterator[tuple[Any, Tensor]]:
        """Yields the sums still in flight."""
        before, self._pending = self._pending, None
        return self._received(before)

    @staticmethod
    def _received(sent: tuple[Any, Tensor, dist.Work] | None) -> Iterator[tuple[Any, Tensor]]:
        if sent is not None:
            place, total, work = sent
            work.wait()
            yield place, total
