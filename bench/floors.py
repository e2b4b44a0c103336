"""The denominator: the minimum bytes and operations of a case, at the rates measured in the same run.

Every input is read once and every output written once; rows of masked tokens are not read, but their gradient is
written. In matrix products, a multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from bench.cases import Case
from bench.inputs import Inputs

if TYPE_CHECKING:
    from epo_kernels.backends.triton import Chip, Mode


class Work(NamedTuple):
    bytes: int
    flops: int  # of matrix products only


class Ceilings(NamedTuple):
    """Measured rates: bytes per second of a copy, counting read and write; FLOP per second of the bare products."""

    bytes_per_second: float
    flops_per_second: float | None


class Ceiling(NamedTuple):
    """A bare operation that is timed together with the implementations."""

    name: str
    computes: str
    run: Callable[[int], object]  # takes the round's number, which it ignores
    work: Work


def least_work(case: Case) -> Work:
    """The minimum work of any implementation of the case, for n of N tokens counted:

    - loss: (n + N) rows of logits; score: n rows
    - linear-loss: three products, 6nDV; linear-score: one, 2nDV; hidden states and head, and their gradients
    """
    size, counted, wide = case.torch_dtype.itemsize, case.counted, case.vocab_size
    if not case.linear:
        rows = counted + case.tokens if case.gradient else counted
        return Work(size * rows * wide, 0)
    deep = case.hidden_size
    read = counted * deep + wide * deep
    written = case.tokens * deep + wide * deep if case.gradient else 0
    return Work(size * (read + written), (6 if case.gradient else 2) * counted * deep * wide)


def floor_seconds(work: Work, ceilings: Ceilings) -> float:
    """The larger of the times for moving the bytes and for the operations."""
    seconds = work.bytes / ceilings.bytes_per_second
    if work.flops and ceilings.flops_per_second:
        seconds = max(seconds, work.flops / ceilings.flops_per_second)
    return seconds


def make_ceilings(case: Case, inputs: Inputs) -> list[Ceiling]:
    """A copy of the case's largest input and, in linear tasks, its one or three bare products over all N tokens.

    If the logits of all tokens exceed 4 GiB (1 GiB on a CPU), the products use fewer tokens.
    """
    source = inputs.rows[-1].detach()
    target = torch.empty_like(source)
    copied = "head" if case.linear else "logits"
    copy = Ceiling(
        "ceiling: copy",
        f"a copy of the {copied}: one read, one write",
        lambda _: target.copy_(source),
        Work(2 * source.numel() * source.element_size(), 0),
    )
    if not case.linear:
        return [copy]
    return [copy, _products(case, inputs)]


def _products(case: Case, inputs: Inputs) -> Ceiling:
    limit = (4 if inputs.device.type == "cuda" else 1) << 30
    rows = min(case.tokens, max(limit // (case.vocab_size * case.torch_dtype.itemsize), 1))
    hidden, weight = inputs.rows[0].detach().flatten(0, 1)[:rows], inputs.rows[1].detach()
    logits = torch.empty(rows, case.vocab_size, dtype=hidden.dtype, device=hidden.device)
    number = 3 if case.gradient else 1
    grad_hidden = torch.empty_like(hidden) if case.gradient else None
    grad_weight = torch.empty_like(weight) if case.gradient else None

    def run(_: int) -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if case.gradient:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return Ceiling(
        "ceiling: three products" if case.gradient else "ceiling: one product",
        f"the bare products of {rows} tokens, nothing else",
        run,
        Work(0, 2 * number * rows * case.hidden_size * case.vocab_size),
    )


def moved_bytes(case: Case, implementation: str, device: torch.device) -> int | None:
    """Bytes through device memory by the byte model of the implementation's kernels; None if it has no model."""
    if implementation != "ours:triton" or case.linear:
        return None
    from epo_kernels.backends.triton import chip_of

    return triton_bytes(case, chip_of(device))


def triton_bytes(case: Case, chip: Chip) -> int:
    """Bytes moved by the Triton kernels for the case's logits: a loss in segment scope takes two launches."""
    from epo_kernels.backends.triton import VECTOR_BYTES, launch_plan, row_traffic

    modes: tuple[Mode, ...] = ("loss",) if case.task == "loss" else ("statistics",)
    if case.band_scope == "segment":
        modes = ("statistics", "gradient")
    size, width = case.torch_dtype.itemsize, case.vocab_size
    total = 0
    for mode in modes:
        aligned = width * size % VECTOR_BYTES == 0
        plan = launch_plan(mode, width=width, itemsize=size, aligned=aligned, heavy=False, chip=chip)
        for rows, counted in ((case.counted, True), (case.tokens - case.counted, False)):
            traffic = row_traffic(mode, plan, width=width, vocab_size=width, itemsize=size, counted=counted)
            total += rows * traffic.device_memory
    return total


def ceilings_of(medians: list[tuple[Work, float]]) -> Ceilings:
    """Rates from the timed ceilings, in the order of `make_ceilings`: (work, median seconds) each."""
    copy, *products = medians
    flops = products[0][0].flops / products[0][1] if products else None
    return Ceilings(copy[0].bytes / copy[1], flops)
