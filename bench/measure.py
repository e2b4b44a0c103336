"""Stopwatches: device events on a GPU, wall clock on a CPU; cold caches, peak memory, launches."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = 5, 50
_MB = 1e6
_CPU_FLUSH_BYTES = 128 << 20
# Long enough for the host to queue a whole forward and backward before the device starts.
_HEAD_START_CYCLES = 12_000_000


class Lap(NamedTuple):
    """Seconds of one call: on the device, and until the host has queued it (on a CPU the same)."""

    seconds: float
    host_seconds: float


class Stopwatch(Protocol):
    def time(self, call: Call) -> Lap:
        """One call, with cold caches."""

    def peak_mb(self, call: Call) -> float | None:
        """Peak memory of a call in megabytes (1e6) beyond what was allocated before; None if unknown."""

    def launches(self, call: Call) -> int | None:
        """Number of kernels, copies and fills launched by a call; None if unknown."""

    def free_bytes(self) -> int:
        """Memory available to a call."""

    def close(self) -> None:
        """Release buffers."""


class CudaStopwatch:
    """Times with device events around a call that starts only after the host has queued all of it.

    Gaps between launches, which a training step hides, are therefore excluded, and syncs within the call are included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Twice the L2 cache, written before each call.
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def time(self, call: Call) -> Lap:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        self._flush.fill_(1)
        start.record()
        began = time.perf_counter()
        result = call()
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        del result
        return Lap(start.elapsed_time(end) / 1e3, host)

    def peak_mb(self, call: Call) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / _MB

    def launches(self, call: Call) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
        except RuntimeError:  # no profiler counters on this machine; the times are still valid
            return None
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return len(events) or None  # none at all: the profiler does not work on this machine

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def close(self) -> None:
        torch.cuda.empty_cache()


class CpuStopwatch:
    """Times with the wall clock. Memory is the process's resident memory, whose high-water mark Linux can reset."""

    def __init__(self) -> None:
        self._flush = torch.empty(_CPU_FLUSH_BYTES, dtype=torch.uint8)

    def time(self, call: Call) -> Lap:
        self._flush.fill_(1)
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        del result
        return Lap(seconds, seconds)

    def peak_mb(self, call: Call) -> float | None:
        gc.collect()
        _return_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            result = call()
            peak = _resident("VmHWM")
        except (OSError, LookupError):
            return None
        del result
        return max(peak - before, 0) / _MB

    def launches(self, call: Call) -> int | None:
        return None

    def free_bytes(self) -> int:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else 0

    def close(self) -> None:
        gc.collect()


def _return_free_memory() -> None:
    """Return malloc's free memory to the system; otherwise a call that reuses it would seem to take none."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise LookupError(name)
    return int(found[1]) * 1024


def stopwatch(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


def interleaved(
    calls: dict[str, Callable[[int], object]], watch: Stopwatch, seconds: float, least: int = LEAST_ROUNDS
) -> dict[str, list[Lap]]:
    """Rounds in which each call is timed once, each starting with another call, to average out clock drift.

    Args:
        calls: {name: function of the round's number}; uses another input set each round.
        seconds: time limit for all rounds, of which there are at most 50.
        least: minimum number of rounds, but three if they take three times as long.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in calls}
    names = list(calls)
    began = time.perf_counter()
    with _no_garbage_collection():
        for number in range(MOST_ROUNDS):
            spent = time.perf_counter() - began
            if (number >= least and spent > seconds) or (number >= min(least, 3) and spent > 3 * seconds):
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                laps[name].append(watch.time(partial(calls[name], number)))
    return laps


@contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
