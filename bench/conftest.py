"""Command-line options, and the session that measures each case once for all of its implementations."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import peers, records
from bench.cases import STEPS, SUITES, Case
from bench.measure import Lap, stopwatch
from bench.records import Machine, Record
from bench.roster import implementations
from bench.runner import LOST, Budget, DeviceLost, measure_case

DEVICE_LOST_EXIT = 3


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--bench-suite", choices=sorted(SUITES), help="cases to run (default: the device's)")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda if available")
    group.addoption("--bench-out", type=Path, help="folder for results.json (default: bench/results/<machine>)")
    group.addoption("--bench-seconds", type=float, default=10.0, help="seconds per case; at least three rounds are run")
    group.addoption("--bench-budget", type=float, help="seconds for all cases; the remaining ones are skipped")
    group.addoption("--bench-threads", type=int, default=os.cpu_count(), help="PyTorch's CPU threads (default: all)")
    group.addoption("--bench-resume", action="store_true", help="skip cases that are already in the results")


def _device(config) -> torch.device:
    return torch.device(config.option.bench_device or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_generate_tests(metafunc):
    device = _device(metafunc.config)
    suite = metafunc.config.option.bench_suite or ("gpu" if device.type == "cuda" else "cpu")
    if "step_case" in metafunc.fixturenames:
        metafunc.parametrize("step_case", STEPS[suite], ids=lambda case: case.name, scope="session")
    if "implementation" in metafunc.fixturenames:
        pairs = [(case, implementation) for case in SUITES[suite] for implementation in implementations(case, device)]
        ids = [f"{case.name} {implementation.name}".replace(" ", "_") for case, implementation in pairs]
        metafunc.parametrize(("case", "implementation"), pairs, ids=ids)


class Session:
    """Measures each case when its first test runs, with the selected implementations, and writes the file."""

    def __init__(self, config, selected: dict[Case, list]) -> None:
        self.device = _device(config)
        torch.set_num_threads(config.option.bench_threads)
        self.machine: Machine = records.this_machine(self.device, peers.installed())
        folder = config.option.bench_out
        self.path = (folder or records.RESULTS / self.machine.folder) / "results.json"
        if folder is None and self.device.type == "cpu":
            _refuse_busy_machine()
        self._selected = selected
        self._seconds = config.option.bench_seconds
        self._budget = Budget(config.option.bench_budget)
        self._watch = stopwatch(self.device)
        self._found: dict[Case, tuple[dict[str, Record], dict[str, list[Lap]]]] = {}
        self._broken: dict[Case, str] = {}
        _, before = records.merged(self.path, self.machine, []) if config.option.bench_resume else (None, [])
        self._done = {record.case for record in before if record.median_ms is not None}
        self._banned = {record.key for record in before if record.gate.startswith(LOST)}

    def measured(self, case: Case, name: str) -> tuple[Record, list[Lap]]:
        """The record of one implementation, and its rounds; no rounds if it was not timed."""
        if case in self._broken:
            pytest.skip(f"the case could not be measured: {self._broken[case]}")
        if case not in self._found:
            self.expect(case.name)
            self._found[case] = self._measure(case)
        found, laps = self._found[case]
        if name not in found:
            pytest.skip(f"{LOST} in an earlier run")
        return found[name], laps.get(name, [])

    def expect(self, case: str) -> None:
        """Skip a case that is not needed or no longer possible."""
        if case in self._done:
            pytest.skip("the results contain this case already")
        if not self._budget.allows():
            pytest.skip("over the time budget")

    def add(self, found: dict[str, Record]) -> None:
        """Add the records, keyed by implementation, to the file."""
        records.write(self.path, *records.merged(self.path, self.machine, list(found.values())))

    def _measure(self, case: Case) -> tuple[dict[str, Record], dict[str, list[Lap]]]:
        began = time.monotonic()
        chosen = [entry for entry in self._selected[case] if (case.name, entry.name) not in self._banned]
        try:
            found, laps = measure_case(case, chosen, self._watch, self.device, self._seconds)
        except DeviceLost as lost:
            self.add({record.impl: record for record in lost.records})
            sys.stderr.write(f"{case.name}: {lost}; run again with --bench-resume to continue\n")
            sys.stderr.flush()
            os._exit(DEVICE_LOST_EXIT)  # an ordinary exit would wait for a device that hangs
        except Exception as error:
            self._broken[case] = repr(error)
            raise
        finally:
            self._budget.spent(time.monotonic() - began)
        self.add(found)
        return found, laps


def _refuse_busy_machine() -> None:
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.3 * processors:
        pytest.exit(
            f"load {load:.1f} on {processors} processors: figures from a busy machine are not recorded. Wait until it "
            "is quiet, or use --bench-out FOLDER to see them without recording them",
            returncode=2,
        )


@pytest.fixture(scope="session")
def session(request) -> Session:
    selected: dict[Case, list] = {}
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "implementation" in params:
            selected.setdefault(params["case"], []).append(params["implementation"])
    return Session(request.config, selected)
