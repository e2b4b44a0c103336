"""How one case is measured: inputs, truth, gate, memory, launches, interleaved rounds, records."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench import gate, records
from bench.cases import Case
from bench.floors import Ceiling, Ceilings, Work, ceilings_of, floor_seconds, least_work, make_ceilings, moved_bytes
from bench.implementations import Implementation, Run, missing_memory
from bench.inputs import Inputs, make_inputs
from bench.measure import Lap, Stopwatch, interleaved
from bench.records import Record
from bench.truth import Truth
from epo_kernels.backends import choose_backend

INPUT_SETS = 3
SEED = 20
ADMISSION_SECONDS = 60.0  # time limit to build, compile and check an implementation
HANG_SECONDS = 20.0  # time limit of the device for one call
# After an illegal access or a hang the device is unusable for every implementation of this process.
LOST = "not run: lost the device"


class DeviceLost(RuntimeError):
    """An implementation crashed the device; `records` says which. Continue in a new process."""

    def __init__(self, records: list[Record]) -> None:
        super().__init__(records[0].gate)
        self.records = records


class Hang(RuntimeError):
    """A kernel does not end."""


@dataclass
class Ready:
    """An implementation that passed its gate."""

    run: Run
    peak_mb: float | None
    launches: int | None
    kernels: str | None


def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    watch: Stopwatch,
    device: torch.device,
    seconds: float,
    input_sets: int = INPUT_SETS,
) -> tuple[dict[str, Record], dict[str, list[Lap]]]:
    """Records of all implementations and of the case's ceilings, by name, and the rounds of those that were timed.

    Args:
        seconds: time limit of the timed rounds (see `interleaved`).

    Raises:
        DeviceLost: an implementation left the device unusable.
    """
    truth = Truth(case, make_inputs(case, device, SEED))
    first = truth.inputs
    sets = [first, *(make_inputs(case, device, SEED + n, first.weight) for n in range(1, input_sets))]
    found: dict[str, Record] = {}
    ready: dict[str, Ready] = {}
    for implementation in implementations:
        verdict, passed = _admit(case, implementation, first, truth, watch)
        found[implementation.name] = _record(case, implementation.name, implementation.computes, verdict)
        if passed is not None:
            ready[implementation.name] = passed
    del truth
    watch.close()

    ceilings = make_ceilings(case, first)
    calls: dict[str, Callable[[int], object]] = {name: _in_turn(entry.run, sets) for name, entry in ready.items()}
    calls |= {ceiling.name: ceiling.run for ceiling in ceilings}
    try:
        for ceiling in ceilings:
            ceiling.run(0)
        laps = interleaved(calls, watch, seconds)
    except RuntimeError as error:
        if device.type == "cuda" and not _answers():  # nobody knows whose call it was
            lost = f"{LOST} in the rounds ({_line_of(error)})"
            raise DeviceLost([_record(case, entry.name, entry.computes, lost) for entry in implementations]) from error
        raise
    for ceiling in ceilings:
        found[ceiling.name] = _record(case, ceiling.name, ceiling.computes, gate.PASS, ceiling.work)
    _fill(case, found, ready, ceilings, laps, device)
    watch.close()
    return found, laps


def _in_turn(run: Callable[[Inputs], object], sets: Sequence[Inputs]) -> Callable[[int], object]:
    """A function of the round's number that uses another input set each round."""
    return lambda number: run(sets[number % len(sets)])


def _admit(
    case: Case, implementation: Implementation, inputs: Inputs, truth: Truth, watch: Stopwatch
) -> tuple[str, Ready | None]:
    """The gate's verdict and, if it passed, the data for the rounds."""
    if reason := missing_memory(case, implementation, watch.free_bytes()):
        return f"not run: {reason}", None
    true = truth.outputs(implementation.contract)
    try:
        with _limited(ADMISSION_SECONDS):
            run = implementation.build()
            gate.poison(inputs.device, next(iter(inputs.leaves.values())).numel())
            outputs = run(inputs)
            _await(inputs.device)
            verdict = gate.check(case, outputs, true)
            if verdict != gate.PASS:
                return verdict, None
            peak_mb, launches = watch.peak_mb(lambda: run(inputs)), watch.launches(lambda: run(inputs))
            return verdict, Ready(run, peak_mb, launches, kernels_that_ran(implementation.name))
    except Exception as error:  # from another library, of any kind: shown in the report
        message = _line_of(error)
        if inputs.device.type == "cuda" and (isinstance(error, Hang) or not _answers()):
            record = _record(case, implementation.name, implementation.computes, f"{LOST} ({message})")
            raise DeviceLost([record]) from error
        watch.close()
        return f"not run: {message}", None


def kernels_that_ran(name: str) -> str | None:
    """The family of kernels last launched by our CUDA backend; None for other implementations."""
    if name != "ours:cuda":
        return None
    return choose_backend("cuda", torch.device("cuda")).kernels.ran


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the body takes longer: compiling may take minutes. Only works in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not built and checked within {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def _await(device: torch.device) -> None:
    """Wait for the device, but not forever: a signal's handler cannot interrupt a synchronization.

    Raises:
        Hang: the device did not finish in time.
    """
    if device.type != "cuda":
        return
    done, end = torch.cuda.Event(), time.monotonic() + HANG_SECONDS
    done.record()
    while not done.query():
        if time.monotonic() > end:
            raise Hang(f"still running on the device after {HANG_SECONDS:.0f} s")
        time.sleep(0.001)


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:200]


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def _record(case: Case, name: str, computes: str, verdict: str, work: Work | None = None) -> Record:
    work = work or least_work(case)
    return Record(
        case.name,
        name,
        *(None,) * 5,
        verdict,
        computes,
        bytes=work.bytes,
        flops=work.flops,
        date=records.now(),
        commit=records.commit(),
    )


def _fill(
    case: Case,
    found: dict[str, Record],
    ready: dict[str, Ready],
    ceilings: list[Ceiling],
    laps: dict[str, list[Lap]],
    device: torch.device,
) -> None:
    """Add the timings to the records."""
    medians = {name: statistics.median(lap.seconds for lap in own) for name, own in laps.items()}
    rates: Ceilings = ceilings_of([(ceiling.work, medians[ceiling.name]) for ceiling in ceilings])
    floor = floor_seconds(least_work(case), rates)
    own = [medians[name] for name in medians if found[name].ours]
    for name, median in medians.items():
        record, times = found[name], [lap.seconds for lap in laps[name]]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        record.median_ms, record.spread_ms = 1e3 * median, [1e3 * low, 1e3 * high]
        record.floor_ms, record.ratio_to_floor = 1e3 * floor, median / floor
        record.ratio_to_ours = median / min(own) if own else None
        record.rounds = len(times)
        record.host_ms = 1e3 * statistics.median(lap.host_seconds for lap in laps[name])
        if name in ready:
            record.peak_mb, record.launches = ready[name].peak_mb, ready[name].launches
            record.kernels = ready[name].kernels
            record.moved_bytes = moved_bytes(case, name, device)
    # Untimed implementations have a floor too, because it belongs to the case.
    for record in found.values():
        record.floor_ms = 1e3 * floor


class Budget:
    """Wall time left for whole cases; None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._spent: list[float] = []

    def allows(self) -> bool:
        """Whether a case of average length so far still fits."""
        expected = statistics.mean(self._spent) if self._spent else 0.0
        return self._end is None or time.monotonic() + expected < self._end

    def spent(self, seconds: float) -> None:
        self._spent.append(seconds)
