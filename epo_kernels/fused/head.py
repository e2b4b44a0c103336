"""A language-model head applied in chunks: its logits, and the gradients of hidden states, weight and bias.

Products use only the head's vocabulary rows, so its padding rows may contain anything, including NaN and inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epo_kernels.fused.rows import Rows, RowStatistics, StatisticsKernels
from epo_kernels.fused.sharded import PartialSums
from epo_kernels.inputs import LogitTransform, without_autocast
from epo_kernels.shard import Shard

ROW_MULTIPLE = 128  # rows of a matrix product's tile
_TILE_COLUMNS = 256
_CAST_TILE_BYTES = 32 << 20  # float32 copies of narrower operands, on the CPU
_FLOAT16_EXPONENT = 15  # ∂logits of a chunk are scaled to below 2^this; float16 ends at 2^16
_SMALLEST_GRADIENT = 2.0**-80  # smaller gradients are not scaled up further

Needs = tuple[bool, bool, bool]  # whether hidden states, weight and bias need a gradient


def chunk_rows(num_rows: int, row_bytes: int, max_chunk_bytes: int, hidden_size: int, num_processors: int) -> int:
    """Number of tokens per chunk.

    A multiple of 128 within the budget, with which there are as few chunks as possible, because each one reads and
    writes the whole ∂weight. On a CPU, the largest; on a GPU, the one whose ∂hidden product (chunk, V) @ (V, D), cut
    into tiles of 128 by 256, best fills its last wave. Below 128 only if the budget allows no more.

    Args:
        num_rows: total number of tokens.
        row_bytes: live bytes per token.
        max_chunk_bytes: the budget.
        hidden_size: D.
        num_processors: number of multiprocessors of the GPU; 1 on a CPU.
    """
    budget = max(max_chunk_bytes // row_bytes, 1)
    if budget < ROW_MULTIPLE:
        return budget
    needed = math.ceil(max(num_rows, 1) / ROW_MULTIPLE)
    most = min(budget // ROW_MULTIPLE, needed)
    least = math.ceil(needed / math.ceil(needed / most))
    columns = math.ceil(hidden_size / _TILE_COLUMNS)

    def filling(multiple: int) -> float:
        waves = multiple * columns / num_processors
        return waves / math.ceil(waves)

    return ROW_MULTIPLE * max(range(least, most + 1), key=lambda multiple: (filling(multiple), multiple))


@dataclass(frozen=True)
class UnmaskedTokens:
    """The n counted tokens, in order: their indices in (B, T), each (n,) int64."""

    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, part: slice) -> UnmaskedTokens:
        return UnmaskedTokens(self.rows[part], self.columns[part])

    def take(self, values: Tensor) -> Tensor:
        """(B, T, ...) -> (n, ...)."""
        return values[self.rows, self.columns]

    def take_row(self, values: Tensor) -> Tensor:
        """(B, T) -> (1, n)."""
        return self.take(values)[None]

    def put(self, values: Tensor, shape: torch.Size) -> Tensor:
        """(1, n) -> (B, T), 0 elsewhere; differentiable."""
        return values.new_zeros(shape).index_put((self.rows, self.columns), values[0])


def unmasked_tokens(mask: Tensor, num_active: int | None) -> UnmaskedTokens:
    """The positions where the mask (B, T) is True. Syncs once, unless their number is given."""
    places = mask.nonzero() if num_active is None else torch.nonzero_static(mask, size=num_active, fill_value=0)
    return UnmaskedTokens(places[:, 0], places[:, 1])


class Head:
    """A head applied to the unmasked tokens, chunk by chunk, into one buffer reused by every chunk.

    Args:
        hidden: (B, T, D).
        weight: (V, D).
        bias: (V,) or None.
        product_dtype, logits_dtype: see `Projection`.
        vocab_size: size of the whole vocabulary; only those rows of the weight are used.
        unmasked: the counted tokens.
        max_chunk_bytes: limit on a chunk's logits, hidden states and their gradients.
        shard: see `Chunking`. Chunk sizes follow the widest rank, so they are the same on all ranks.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        vocab_size: int,
        product_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        unmasked: UnmaskedTokens,
        max_chunk_bytes: int,
        shard: Shard | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden.detach(), weight.detach(), bias
        self.unmasked = unmasked
        self.shard = shard
        self.logits_dtype = logits_dtype
        self.vocabulary = slice(vocab_size if shard is None else shard.own_vocabulary(vocab_size))
        self.product_weight = self.weight[self.vocabulary].to(product_dtype)
        self._product_bias = None if bias is None else bias.detach()[self.vocabulary].to(logits_dtype)
        width, hidden_size = weight.shape
        widest = width if shard is None else max(shard.widths)
        row_bytes = widest * logits_dtype.itemsize
        if logits_dtype != product_dtype:  # ∂logits is cast for the two products
            row_bytes += widest * product_dtype.itemsize
        # Hidden states and their gradient, which may be float32.
        row_bytes += hidden_size * (product_dtype.itemsize + max(product_dtype.itemsize, 4))
        processors = _processors(hidden.device) if shard is None else 1  # ranks may have different chips
        self._rows = chunk_rows(len(unmasked), row_bytes, max_chunk_bytes, hidden_size, processors)
        self._buffer = hidden.new_empty(min(self._rows, len(unmasked)), width, dtype=logits_dtype)

    @property
    def in_one_chunk(self) -> bool:
        """Whether one chunk takes all unmasked tokens."""
        return len(self.unmasked) <= self._rows

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields each chunk's slice of the unmasked tokens, hidden (c, D), and logits (c, V) in the reused buffer.

        Logits past the vocabulary are unspecified.
        """
        for start in range(0, len(self.unmasked), self._rows):
            part = slice(start, min(start + self._rows, len(self.unmasked)))
            hidden = self.unmasked[part].take(self.hidden).to(self.product_weight.dtype)
            logits = self._buffer[: len(hidden)]
            self._project(hidden, logits[:, self.vocabulary])
            yield part, hidden, logits

    def _project(self, hidden: Tensor, logits: Tensor) -> None:
        weight, bias = self.product_weight.t(), self._product_bias
        if self.logits_dtype == hidden.dtype:
            if bias is None:
                torch.mm(hidden, weight, out=logits)
            else:
                torch.addmm(bias, hidden, weight, out=logits)  # rounds the sum once
            return
        if hidden.is_cuda:
            torch.mm(hidden, weight, out_dtype=self.logits_dtype, out=logits)
        else:
            wide = hidden.to(self.logits_dtype)
            with without_autocast(hidden.device):
                for tile in _tiles(weight.shape[1], wide.shape[1] * wide.element_size()):
                    logits[:, tile] = wide @ weight[:, tile].to(wide.dtype)
        if bias is not None:
            logits.add_(bias)


class HeadGradients:
    """∂hidden, ∂weight and ∂bias, accumulated over chunks; None for gradients that are not needed.

    ∂weight of several chunks is added up in float32, and rounded once. A single chunk's product writes it in the
    weight's dtype, which takes neither a wider buffer nor a cast.

    With a split vocabulary ∂hidden is a partial sum: float32, summed over the ranks, and rounded once.

    The range of float16 is too small for gradients before they are multiplied by the upstream gradient. ∂hidden of
    float16 hidden states stays float32 until the end. For float16 products, ∂logits are multiplied by a power of two
    that brings the chunk's largest value just below the float16 maximum. The scale never rises from chunk to chunk; if
    it falls, the accumulated ∂weight is rescaled with it.
    """

    def __init__(self, head: Head, needs: Needs, kernels: StatisticsKernels) -> None:
        self._head, self._kernels = head, kernels
        self.scales = head.product_weight.dtype == torch.float16
        self._scale: Tensor | None = None  # of ∂weight
        wide = torch.promote_types(head.product_weight.dtype, torch.float32)
        self._hidden = self._weight = self._bias = None
        self._dtypes = head.hidden.dtype, head.weight.dtype, None if head.bias is None else head.bias.dtype
        if needs[0]:
            dtype = torch.float32 if head.hidden.dtype == torch.float16 else head.hidden.dtype
            self._hidden = torch.zeros_like(head.hidden, dtype=dtype, memory_format=torch.contiguous_format)
        if needs[1]:
            self._weight = self._unwritten_weight(wide)
        if needs[2]:
            self._bias = head.weight.new_zeros(head.weight.shape[0], dtype=wide)
        self._sums = PartialSums(head.shard) if head.shard is not None and needs[0] else None

    def add_rows(
        self,
        part: slice,
        hidden: Tensor,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Add a chunk's gradients: hidden (c, D), upstream gradients (1, c). Overwrites the logits of the rows."""
        if self.scales:
            scale = self._lowered(_float16_scale(rows.transform, statistics, grad_log_probs, grad_entropy))
            grad_log_probs = grad_log_probs * scale
            grad_entropy = None if grad_entropy is None else grad_entropy * scale
        self._kernels.gradient(rows, statistics, grad_log_probs, grad_entropy, rows.logits)
        self.add(part, hidden, rows.logits[0])

    def add(self, part: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add a chunk's gradients: hidden (c, D), and grad_logits (c, V) already multiplied by the scale."""
        vocabulary, weight = self._head.vocabulary, self._head.product_weight
        if self._bias is not None:
            self._bias[vocabulary] += self._unscaled(grad_logits[:, vocabulary].sum(dim=0, dtype=self._bias.dtype))
        grad_logits = grad_logits.to(hidden.dtype)[:, vocabulary]  # cast before slicing, which keeps rows aligned
        if self._sums is not None:
            wide = torch.promote_types(grad_logits.dtype, torch.float32)
            self._put(self._sums.exchange(part, self._unscaled(_wide_product(grad_logits, weight, wide))))
        elif self._hidden is not None:
            wide = torch.float32 if self.scales else grad_logits.dtype
            self._put([(part, self._unscaled(_wide_product(grad_logits, weight, wide)))])
        if self._weight is not None:
            _add_product(self._weight[vocabulary], grad_logits.t(), hidden, overwrite=part.start == 0)

    def complete(self) -> None:
        """After the last chunk: wait for the contributions of other ranks, and free the chunk's memory."""
        if self._sums is not None:
            self._put(self._sums.finish())
        del self._head

    def finish(self, factor: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients times factor, in the dtypes of their inputs. Call once: the buffers are handed over."""
        of_weight = factor
        if self._scale is not None:
            of_weight = self._scale.reciprocal() if factor is None else factor / self._scale
        hidden, weight, bias = self._dtypes
        return (
            self._multiplied(self._hidden, hidden, factor),
            self._multiplied(self._weight, weight, of_weight),
            self._multiplied(self._bias, bias, factor),
        )

    def _multiplied(self, gradient: Tensor | None, dtype: torch.dtype | None, factor: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        if factor is None:
            return gradient.to(dtype)
        if gradient.dtype == dtype:
            self._scale_in_place(gradient, factor)
            return gradient
        # Multiplied in the pass that casts, before rounding.
        result = torch.empty_like(gradient, dtype=dtype)
        self._kernels.scale(_of_three_sizes(gradient), factor, _of_three_sizes(result))
        return result

    def _unwritten_weight(self, wide: torch.dtype) -> Tensor:
        """∂weight, of which only the rows that no product writes are filled, with zeros."""
        head = self._head
        is_narrow = head.in_one_chunk and not self.scales and head.weight.dtype == head.product_weight.dtype
        gradient = torch.empty_like(head.weight, dtype=head.weight.dtype if is_narrow else wide)
        written = head.vocabulary.stop if len(head.unmasked) else 0
        gradient[written:].zero_()
        return gradient

    def _scale_in_place(self, gradient: Tensor, factor: Tensor) -> None:
        values = _of_three_sizes(gradient)
        self._kernels.scale(values, factor, values)

    def _lowered(self, scale: Tensor) -> Tensor:
        """The scale from now on: the smaller of this one and the previous one."""
        if self._scale is not None:
            scale = torch.minimum(scale, self._scale)
            if self._weight is not None:
                self._scale_in_place(self._weight, scale / self._scale)
        self._scale = scale
        return scale

    def _unscaled(self, values: Tensor) -> Tensor:
        return values if self._scale is None else values.div_(self._scale)

    def _put(self, parts: Iterable[tuple[slice, Tensor]]) -> None:
        assert self._hidden is not None
        for part, grad_hidden in parts:
            places = self._head.unmasked[part]
            self._hidden[places.rows, places.columns] = grad_hidden.to(self._hidden.dtype)


def _float16_scale(
    transform: LogitTransform, statistics: RowStatistics, grad_log_probs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """The power of two, 0-d float32, that brings the largest gradient of the rows' logits just below 2^15. No sync.

    |∂ℓ/∂x| = |∂z/∂x (a (1[v=y] - p) - b p (log p + H))| <= |∂z/∂x| (|a| + |b| (1/e + H)), where |∂z/∂x| <= scale/τ.
    """
    largest = grad_log_probs.abs()
    if grad_entropy is not None:
        assert statistics.entropy is not None
        largest = largest + grad_entropy.abs() * (math.exp(-1.0) + statistics.entropy)
    largest = largest * abs(1.0 if transform.scale is None else transform.scale) / transform.temperature
    # Non-finite values stay non-finite under any scale, and must not affect the scale of other rows.
    finite = torch.where(largest.isfinite(), largest, 0.0).amax().clamp(min=_SMALLEST_GRADIENT)
    return torch.ldexp(torch.ones_like(finite), _FLOAT16_EXPONENT - torch.frexp(finite).exponent)


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in a dtype that may be wider than that of the operands."""
    with without_autocast(left.device):
        if dtype == right.dtype:
            return left @ right
        if right.is_cuda:
            return torch.mm(left, right, out_dtype=dtype)
        total = left.new_zeros(left.shape[0], right.shape[1], dtype=dtype)
        for tile in _tiles(right.shape[0], right.shape[1] * dtype.itemsize):
            total.addmm_(left[:, tile].to(dtype), right[tile].to(dtype))
        return total


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """total += left @ right, or total = left @ right, in the dtype of total, which may be wider than the operands'."""
    beta = 0 if overwrite else 1  # with 0 the products don't read total
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=beta)
    elif right.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        wide = right.to(total.dtype)
        for tile in _tiles(total.shape[0], wide.shape[0] * wide.element_size()):
            total[tile].addmm_(left[tile].to(total.dtype), wide, beta=beta)


def _of_three_sizes(gradient: Tensor) -> Tensor:
    """A view with the three sizes that kernels expect."""
    return gradient[(None,) * (3 - gradient.dim())]


def _tiles(length: int, line_bytes: int) -> Iterator[slice]:
    lines = max(_CAST_TILE_BYTES // max(line_bytes, 1), 1)
    for start in range(0, length, lines):
        yield slice(start, min(start + lines, length))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
