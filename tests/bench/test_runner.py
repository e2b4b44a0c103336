"""How a case is measured, with a fake stopwatch."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from bench import measure, runner
from bench.cases import Case
from bench.implementations import Implementation, missing_memory, ours
from bench.inputs import make_inputs
from bench.measure import CpuStopwatch, Lap, interleaved
from bench.roster import implementations
from bench.runner import DeviceLost, measure_case
from epo_kernels.declaration import PolicyLossName, RowPolicyLoss

CPU = torch.device("cpu")
CASE = Case("loss", "tiny", 64, "fp32")


class FakeWatch:
    """Says a fixed time for each function that names one, and counts the calls."""

    def __init__(self, free=1 << 40):
        self.free = free

    def time(self, call):
        return Lap(call() or 0.004, 0.001)

    def peak_mb(self, call):
        return 7.0

    def launches(self, call):
        return 3

    def free_bytes(self):
        return self.free

    def close(self):
        pass


def implementation(name, run, **arguments):
    return Implementation(name, "loss", lambda: run, **arguments)


class Timed(dict):
    """Outputs that carry their duration for the fake stopwatch."""


@pytest.fixture
def seconds(monkeypatch):
    """Rounds take what the table says of a name; ceilings take 2 ms."""
    table = {}

    def rounds(calls, watch, limit):
        return {name: [Lap(table.get(name, 0.002), 0.001)] * 5 for name in calls}

    monkeypatch.setattr(runner, "interleaved", rounds)
    return table


def test_records_hold_the_ratios(seconds):
    run = ours(CASE, "reference")
    seconds.update({"ours:a": 0.004, "ours:b": 0.006, "other": 0.012})
    chosen = [implementation(name, run, ours=name.startswith("ours")) for name in seconds]
    found, laps = measure_case(CASE, chosen, FakeWatch(), CPU, seconds=0.1)
    assert found["other"].median_ms == pytest.approx(12.0)
    assert found["other"].ratio_to_ours == pytest.approx(3.0)
    # The copy moved 2 × 64 × 1000 × 4 bytes in 2 ms, and the loss needs as many.
    assert found["other"].floor_ms == pytest.approx(2.0)
    assert found["other"].ratio_to_floor == pytest.approx(6.0)
    assert found["ours:b"].ratio_to_ours == pytest.approx(1.5)
    assert (found["other"].peak_mb, found["other"].launches, found["other"].rounds) == (7.0, 3, 5)
    assert found["ceiling: copy"].ratio_to_floor == pytest.approx(1.0)
    assert laps["other"][0].seconds == 0.012


def test_records_say_which_cuda_kernels_ran(seconds, monkeypatch):
    kernels = SimpleNamespace(ran="ring")
    monkeypatch.setattr(runner, "choose_backend", lambda *_: SimpleNamespace(kernels=kernels))
    chosen = [implementation(name, ours(CASE, "reference"), ours=True) for name in ("ours:cuda", "ours:triton")]
    found, _ = measure_case(CASE, chosen, FakeWatch(), CPU, seconds=0.1)
    assert (found["ours:cuda"].kernels, found["ours:triton"].kernels) == ("ring", None)


def test_what_fails_its_gate_is_shown_and_not_timed(seconds):
    right = ours(CASE, "reference")

    def wrong(inputs):
        outputs = right(inputs)
        return {**outputs, "grad_logits": outputs["grad_logits"] * 1.01}

    chosen = [implementation("ours:a", right, ours=True), implementation("wrong", wrong)]
    found, laps = measure_case(CASE, chosen, FakeWatch(), CPU, seconds=0.1)
    assert found["wrong"].gate.startswith("fails: grad_logits is off by 1.0e-02")
    assert found["wrong"].median_ms is None
    assert "wrong" not in laps
    assert found["ours:a"].gate == "pass"


def test_what_cannot_run_is_shown_with_its_reason(seconds):
    def absent():
        raise ModuleNotFoundError("No module named 'quack'")

    chosen = [
        implementation("ours:a", ours(CASE, "reference"), ours=True),
        Implementation("quack", "cross-entropy", absent),
        Implementation("eager", "loss", lambda: ours(CASE, "reference"), eager_memory=True),
    ]
    found, _ = measure_case(CASE, chosen, FakeWatch(free=1000), CPU, seconds=0.1)
    assert found["quack"].gate == "not run: ModuleNotFoundError: No module named 'quack'"
    assert found["eager"].gate.startswith("not run: needs about 0 GB for its copies of the logits")
    assert found["quack"].floor_ms is not None


def test_what_takes_too_long_is_given_up(seconds, monkeypatch):
    monkeypatch.setattr(runner, "ADMISSION_SECONDS", 0.2)

    def slow():
        time.sleep(5.0)

    found, _ = measure_case(CASE, [Implementation("slow", "loss", slow)], FakeWatch(), CPU, seconds=0.1)
    assert found["slow"].gate.startswith("not run: TimeoutError")


def test_a_lost_device_names_who_lost_it(monkeypatch):
    def crash(inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(runner, "_answers", lambda: False)
    monkeypatch.setattr(runner.gate, "poison", lambda device, size: None)
    entry = implementation("peer", crash)

    class OnGpu:
        device = torch.device("cuda")
        leaves = {"grad_logits": torch.zeros(1)}  # noqa: RUF012

    class Truth:
        def outputs(self, contract):
            return {}

    with pytest.raises(DeviceLost) as lost:
        runner._admit(CASE, entry, OnGpu(), Truth(), FakeWatch())
    (record,) = lost.value.records
    assert record.impl == "peer"
    assert record.gate.startswith(f"{runner.LOST} (RuntimeError: CUDA error: an illegal memory access")


def test_a_call_that_never_ends_loses_the_device(monkeypatch):
    class Event:
        def record(self):
            pass

        def query(self):
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(runner, "HANG_SECONDS", 0.1)
    monkeypatch.setattr(runner.gate, "poison", lambda device, size: None)
    given = SimpleNamespace(device=torch.device("cuda"), leaves={"grad_logits": torch.zeros(1)})
    truth = SimpleNamespace(outputs=lambda contract: {})
    with pytest.raises(DeviceLost) as lost:
        runner._admit(CASE, implementation("ours:cuda", lambda inputs: {}), given, truth, FakeWatch())
    (record,) = lost.value.records
    assert record.gate == f"{runner.LOST} (Hang: still running on the device after 0 s)"


def test_a_device_lost_in_the_rounds_bans_all_who_were_timed(monkeypatch):
    def crash(calls, watch, limit):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Device:
        type = "cuda"

    monkeypatch.setattr(runner, "interleaved", crash)
    monkeypatch.setattr(runner, "_answers", lambda: False)
    monkeypatch.setattr(runner, "make_inputs", lambda case, device, *rest: make_inputs(case, CPU, *rest))
    chosen = [implementation(name, ours(CASE, "reference")) for name in ("ours:a", "ours:b")]
    with pytest.raises(DeviceLost) as lost:
        measure_case(CASE, chosen, FakeWatch(), Device(), seconds=0.1)
    assert [record.impl for record in lost.value.records] == ["ours:a", "ours:b"]
    assert all(record.gate.startswith(f"{runner.LOST} in the rounds") for record in lost.value.records)


def test_eager_is_not_tried_beyond_memory():
    case = Case("linear-loss", "d64-v151936", 4096, "fp32", chunk_mb=512)
    (eager,) = (entry for entry in implementations(case, CPU) if entry.name == "eager")
    assert "needs about 15 GB" in missing_memory(case, eager, free=10 << 30)
    assert missing_memory(case, eager, free=20 << 30) is None


def test_rounds_are_interleaved_and_begin_with_another_each_time():
    order = []
    calls = {name: lambda number, name=name: order.append(name) for name in "abc"}
    laps = interleaved(calls, FakeWatch(), seconds=0.0, least=3)
    assert order == list("abcbcacab")
    assert {len(own) for own in laps.values()} == {3}


def test_cpu_stopwatch_sees_memory_and_time():
    watch = CpuStopwatch()
    lap = watch.time(lambda: time.sleep(0.02))
    assert lap.seconds >= 0.02


def test_peak_memory_counts_what_the_allocator_kept_from_an_earlier_call():
    """In a separate process in which glibc keeps freed memory, as in a trainer's process."""
    script = """
import ctypes, torch
from bench.inputs import make_inputs
from bench.measure import CpuStopwatch
libc = ctypes.CDLL(None)
libc.mallopt(-1, 2**31 - 1), libc.mallopt(-3, 1 << 30)  # trim threshold, mmap threshold
call = lambda: torch.ones(64 << 20, dtype=torch.uint8)
watch = CpuStopwatch()
for _ in range(3):
    print(watch.peak_mb(call))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    for peak in map(float, done.stdout.split()):
        assert 60 <= peak <= 80


def test_budget_leaves_out_what_would_not_fit():
    assert runner.Budget(None).allows()
    budget = runner.Budget(1000.0)
    assert budget.allows()
    budget.spent(2000.0)
    assert not budget.allows()


def test_stopwatch_is_chosen_by_device():
    assert isinstance(measure.stopwatch(CPU), CpuStopwatch)


@pytest.mark.parametrize("task", ["loss", "linear-loss"])
def test_every_policy_loss_is_measured_and_passes_its_gate(seconds, task):
    case = Case(task, "tiny", 64, "fp32", policies=True)
    chosen = implementations(case, CPU)
    policies = {entry.name.partition(" ")[2] for entry in chosen}
    assert policies == {*get_args(RowPolicyLoss), *get_args(PolicyLossName)} - {"dppo"}
    found, _ = measure_case(case, chosen, FakeWatch(), CPU, seconds=0.1)
    assert {found[entry.name].gate for entry in chosen} == {"pass"}
    losses = {entry.name: entry.build()(make_inputs(case, CPU, 0))["loss"].item() for entry in chosen}
    assert len(set(losses.values())) >= len(losses) - 1, "each is another loss; the regions of dppo may agree"
