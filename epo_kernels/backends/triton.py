"""The "triton" backend: launching the kernels of `triton_kernels.py`, and a model of their memory traffic.

There is no tuning at run time: `launch_plan` is a rule over row length, dtype and chip.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from epo_kernels.aggregation import sequence_lengths
from epo_kernels.declaration import ROW_SUMS
from epo_kernels.fused.backend import FusedBackend
from epo_kernels.fused.rows import Prepared, RowLoss, Rows, RowStatistics, Spread, Terms
from epo_kernels.inputs import Aggregation, LogitTransform, Scalar

Mode = Literal["statistics", "spread", "gradient", "loss"]

VECTOR_BYTES = 16  # loaded by a thread at once
ALIGNMENT = 16  # elements: Triton needs pointers and strides divisible by this to load that much at once
REGISTERS = 128  # limit per thread; no variant spills (tests/backends/test_ahead_of_time.py)
THREADS_PER_PROCESSOR = 65536 // REGISTERS
TILE_BYTES = 32  # per thread and tile; half if elements need more registers each
SWEEP_WARPS = 4
MAX_WARPS = 16  # of a row in one tile
STAGES = 4
SCALE_BLOCK = 4096  # elements that a program scales at once
WEIGHTS_TILE = 2048  # mask tokens that 4 warps count at once
L2_SHARE = 0.7  # share of the cache available to rows between their two sweeps


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that the plan depends on: number of multiprocessors, and L2 cache size in bytes."""

    processors: int
    l2_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a kernel processes its rows.

    Attributes:
        depth, lanes, vector: shape of a tile in elements; a lane is a thread, vector the elements it loads at once.
        warps: warps per program.
        stages: loads run this many tiles ahead, minus one.
        one_tile: the row stays in registers between statistics and gradient.
        programs: maximum number of programs per launch.
        rereads_hit_l2: all rows in flight fit the L2 cache, so the second sweep reads from it.
    """

    depth: int
    lanes: int
    vector: int
    warps: int
    stages: int
    one_tile: bool
    programs: int
    rereads_hit_l2: bool


def launch_plan(mode: Mode, width: int, itemsize: int, aligned: bool, heavy: bool, chip: Chip) -> Plan:
    """The plan for rows of `width` logits of `itemsize` bytes.

    - A thread processes 32 bytes of a tile, or 16 if elements need more registers than usual. Loads run three tiles
      ahead (two if heavy, none if they cannot be asynchronous: below 16 bytes).
    - A loss whose row fits one tile of 16 warps (8,192 bf16, 4,096 fp32) keeps it in registers, with the fewest warps.
    - Everything else: 4 warps, or the fewest that cover a row in one tile, and as many programs as the registers allow,
      so that some compute while others wait. A loss with gradient reads such rows twice; 16 warps and a single program,
      which would leave more of them in the L2 cache, took 1.72 instead of 1.55 times a copy of the logits (H200, 8,192
      rows of 151,936 bf16).

    Args:
        mode: mode of the kernel.
        aligned: threads may load 16 bytes at once.
        heavy: the vocabulary is narrower than a row, or logits are softcapped.
        chip: the GPU.
    """
    elements = (TILE_BYTES if aligned and not heavy else TILE_BYTES // 2) // itemsize
    vector = VECTOR_BYTES // itemsize if aligned else 1
    one_tile = mode == "loss" and width <= MAX_WARPS * 32 * elements
    warps = min(_power_of_two(-(-width // (32 * elements))), MAX_WARPS if one_tile else SWEEP_WARPS)
    per_processor = min(THREADS_PER_PROCESSOR // (32 * warps), 16)
    programs = chip.processors * per_processor
    fits = mode == "loss" and not one_tile and programs * width * itemsize <= L2_SHARE * chip.l2_bytes
    stages = (STAGES - 1 if heavy else STAGES) if aligned else 1
    return Plan(elements // vector, 32 * warps, vector, warps, stages, one_tile, programs, fits)


@dataclass(frozen=True)
class RowTraffic:
    """Bytes of logits and gradient moved for one row, excluding its token's arguments (about 40 bytes).

    Attributes:
        needed: every logit of the vocabulary read once, every gradient element written once.
        loaded, stored: bytes moved by the kernel's instructions.
        from_l2: the part of loaded that is still in the L2 cache.
    """

    needed: int
    loaded: int
    stored: int
    from_l2: int

    @property
    def device_memory(self) -> int:
        """Bytes that go through device memory."""
        return self.loaded - self.from_l2 + self.stored


def row_traffic(
    mode: Mode, plan: Plan, *, width: int, vocab_size: int, itemsize: int, counted: bool = True, writes: bool = True
) -> RowTraffic:
    """The byte model of a kernel.

    Args:
        mode: mode of the kernel.
        plan: from `launch_plan`.
        width, vocab_size: entries of a row, and the number of real vocabulary entries.
        itemsize: bytes per logit.
        counted: whether the row's mask is 1.
        writes: whether "loss" computes the gradient.
    """
    writes = mode == "gradient" or (mode == "loss" and writes)
    stored = width * itemsize if writes else 0
    if not counted:
        return RowTraffic(needed=stored, loaded=0, stored=stored, from_l2=0)
    tile = plan.depth * plan.lanes * plan.vector
    statistics = min(-(-vocab_size // tile) * tile, width) * itemsize  # whole tiles, up to the end of the vocabulary
    # The sampled token's logit is also loaded, and its gradient also stored, separately.
    sampled, stored_again = 0 if mode == "spread" else itemsize, itemsize if writes else 0
    if mode == "gradient":
        loaded, from_l2 = width * itemsize + sampled, sampled
    elif mode == "loss" and writes and not plan.one_tile:
        loaded = statistics + width * itemsize + sampled
        from_l2 = (statistics if plan.rereads_hit_l2 else 0) + sampled
    else:
        loaded, from_l2 = statistics + sampled, sampled
    return RowTraffic(vocab_size * itemsize + stored, loaded, stored + stored_again, from_l2)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; for the interpreter on the CPU, a small chip with several programs."""
    if device.type != "cuda":
        return Chip(processors=1, l2_bytes=1 << 20)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


class TritonRows:
    """`RowKernels` in Triton.

    Args:
        plan: function that chooses the launch plan.
    """

    def __init__(self, plan: Callable[[Mode, int, int, bool, bool, Chip], Plan] = launch_plan) -> None:
        from epo_kernels.backends import triton_kernels  # imports Triton, which reads TRITON_INTERPRET on import

        self._kernels = triton_kernels
        self._plan = plan

    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        log_probs, maximum, total = (_per_token(rows) for _ in range(3))
        entropies = _per_token(rows) if entropy else None
        if rows.tokens.numel() > 0:
            plan = self._plan_of("statistics", rows, None)
            self._launch("statistics", plan, rows, None, log_probs, entropies, maximum, total)
        return RowStatistics(log_probs, entropies, maximum, total)

    def spread(self, rows: Rows, statistics: RowStatistics) -> Spread:
        spread = Spread(_per_token(rows), _per_token(rows))
        if rows.tokens.numel() > 0:
            plan = self._plan_of("spread", rows, None)
            known = statistics.entropy, statistics.maximum, statistics.sum
            self._launch("spread", plan, rows, None, *known, *spread)
        return spread

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        if rows.tokens.numel() == 0:
            return
        self._launch(
            "gradient",
            self._plan_of("gradient", rows, out),
            rows,
            out,
            *statistics,
            *(grad_log_probs, grad_entropy),
            *(out, *out.stride()),
        )

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        log_probs, entropies = _per_token(rows), _per_token(rows)
        sums = log_probs.new_empty(len(ROW_SUMS), dtype=torch.float64)
        loss = log_probs.new_empty(())
        if rows.tokens.numel() == 0:
            return RowLoss(log_probs, entropies, sums.zero_(), loss.zero_())
        plan = self._plan_of("loss", rows, out)
        partials = sums.new_empty(_programs(plan, rows), self._kernels.SUM_SLOTS.value)
        self._launch(
            "loss",
            plan,
            rows,
            out,
            terms.weights,
            *_strided(terms.advantages),
            *_strided(terms.old_log_probs),
            *_strided(terms.ref_log_probs),
            *_strided(terms.is_weights),
            *_strided(terms.lower),
            *_strided(terms.upper),
            *(terms.coefficients, log_probs, entropies, partials, terms.ticket, sums, loss),
            *((None, 0, 0, 1) if out is None else (out, *out.stride())),
            POLICY_LOSS=terms.policy_loss,
            PENALTY=terms.penalty,
            KL_TYPE=terms.kl_type,
            ONE_TILE=plan.one_tile,
        )
        return RowLoss(log_probs, entropies, sums, loss)

    def prepare(self, mask: Tensor, aggregation: Aggregation, coefficients: tuple[Scalar, ...]) -> Prepared:
        device = mask.device
        batch, length = mask.shape
        prepared = Prepared(
            weights=torch.empty(batch, length, dtype=torch.float32, device=device),
            coefficients=torch.empty(len(coefficients), dtype=torch.float32, device=device),
            ticket=torch.empty(1, dtype=torch.int32, device=device),
            extras=torch.empty(2, dtype=torch.float64, device=device),
        )
        lengths = ids = None
        if aggregation.sequence_ids is not None:
            ids = aggregation.sequence_ids
            lengths = sequence_lengths(mask, ids, aggregation.num_sequences)
        tokens = min(max(_power_of_two(max(length, 1)), 64), WEIGHTS_TILE)
        sequences = WEIGHTS_TILE // tokens
        numbers, pointers = zip(*(_number(value, device) for value in coefficients), strict=True)
        with _on(device):
            self._kernels.token_weights_kernel[(max(-(-batch // sequences), 1),)](
                *_strided(mask.view(torch.uint8)),
                *(batch, length),
                *(lengths, ids, 0 if ids is None else ids.stride(1)),
                batch if lengths is None else aggregation.num_sequences,
                *_number(1.0 if aggregation.normalizer is None else aggregation.normalizer, device),
                *_number(aggregation.loss_scale, device),
                *(numbers, pointers),
                float(aggregation.max_length or 1),
                *prepared,
                MODE=aggregation.loss_agg_mode,
                NORMALIZED=aggregation.normalizer is not None,
                SEQUENCES=sequences,
                TOKENS=tokens,
                num_warps=4,
            )
        return prepared

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        return 1.0 / transform.temperature

    def scale(self, gradient: Tensor, factor: Tensor, out: Tensor) -> None:
        if gradient.numel() == 0:
            return
        in_place = out is gradient
        contiguous = gradient.is_contiguous() and out.is_contiguous()
        if contiguous and gradient.numel() <= 2**31 - SCALE_BLOCK:  # offsets have 32 bits
            # One long row: short ones would leave most of a block empty.
            gradient, out = gradient.view(1, 1, -1), out.view(1, 1, -1)
        batch, length, width = gradient.shape
        with _on(gradient.device):
            self._kernels.scale_kernel[(8 * chip_of(gradient.device).processors,)](
                *(gradient, *gradient.stride()),
                factor,
                *(out, *out.stride()),
                *(batch * length, length, width),
                BLOCK=SCALE_BLOCK,
                UNIT_STRIDE=gradient.stride(2) == 1 and out.stride(2) == 1,
                IN_PLACE=in_place,
                num_warps=8,
            )

    def _plan_of(self, mode: Mode, rows: Rows, out: Tensor | None) -> Plan:
        logits = rows.logits
        aligned = _is_aligned(logits) and (out is None or _is_aligned(out))
        heavy = rows.transform.vocab_size < logits.shape[2] or rows.transform.softcap is not None
        return self._plan(mode, logits.shape[2], logits.element_size(), aligned, heavy, chip_of(logits.device))

    def _launch(
        self, mode: Mode, plan: Plan, rows: Rows, out: Tensor | None, *arguments: Any, **constants: Any
    ) -> None:
        logits = rows.logits
        kernel = getattr(self._kernels, f"row_{mode}_kernel")
        with _on(logits.device):
            kernel[(_programs(plan, rows),)](
                *_row_arguments(rows),
                *arguments,
                **constants,
                DEPTH=plan.depth,
                LANES=plan.lanes,
                VECTOR=plan.vector,
                STAGES=plan.stages,
                UNIT_STRIDE=logits.stride(2) == 1 and (out is None or out.stride(2) == 1),
                PADDED=rows.transform.vocab_size < logits.shape[2],
                num_warps=plan.warps,
                maxnreg=REGISTERS,
            )


def _is_aligned(logits: Tensor) -> bool:
    """Whether every 16-byte vector of a row has an address divisible by 16, as far as Triton can tell."""
    batch_stride, time_stride, stride = logits.stride()
    strides = (batch_stride, time_stride, logits.shape[2])
    return stride == 1 and logits.data_ptr() % 16 == 0 and all(length % ALIGNMENT == 0 for length in strides)


def _programs(plan: Plan, rows: Rows) -> int:
    return min(plan.programs, rows.tokens.numel())


def _per_token(rows: Rows) -> Tensor:
    return torch.empty(rows.tokens.shape, dtype=torch.float32, device=rows.logits.device)


def _strided(values: Tensor | None) -> tuple[Any, ...]:
    """A (B, T) tensor and its strides, as kernel arguments."""
    return (None, 0, 0) if values is None else (values, *values.stride())


def _row_arguments(rows: Rows) -> tuple[Any, ...]:
    """The kernels' arguments from `logits` to `vocab_size`."""
    transform = rows.transform
    temperature = transform.temperature
    value, pointer = _number(temperature, rows.logits.device)
    strides = (0, 0) if pointer is None or pointer.dim() == 0 else pointer.stride()
    return (
        *(rows.logits, *rows.logits.stride()),
        *_strided(rows.tokens),
        *_strided(rows.mask.view(torch.uint8)),
        *(value, pointer, *strides),
        None if transform.scale is None else float(transform.scale),
        None if transform.softcap is None else float(transform.softcap),
        *(rows.tokens.numel(), rows.tokens.shape[1], rows.logits.shape[2], transform.vocab_size),
    )


def _number(value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """A scalar for a kernel: a number, and the device tensor that replaces it, or None."""
    if not isinstance(value, Tensor):
        return float(value), None
    return (1.0, value) if value.device == device else (value.item(), None)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter is enabled, which accepts CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unavailable() -> str | None:
    if find_spec("triton") is None:
        return 'Triton is not installed; pip install "triton>=3.6" (Linux; a CUDA build of torch includes it)'
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device; run on a machine with one and a CUDA build of torch (for tests on CPU tensors, "
            "enable Triton's slow interpreter with the environment variable TRITON_INTERPRET=1)"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the kernels need a GPU of compute capability 8.0 (Ampere) or newer, this one has {major}.{minor}"
    return None


class TritonBackend(FusedBackend):
    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if interpreted() else ("cuda",)
