"""results.json: a list with the machine first, then one record per case and implementation."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "numpy", "transformers")


@dataclass
class Record:
    """The measurements of one implementation in one case. None: not measured; `gate` says why.

    Attributes:
        case, impl: names.
        median_ms: median over the rounds.
        floor_ms: the minimum time, from the case's bytes and operations and the ceilings of the same run.
        ratio_to_floor: median_ms / floor_ms.
        ratio_to_ours: median_ms / that of this library's fastest backend in the case.
        peak_mb: peak memory beyond the inputs, in 1e6 bytes, including gradients.
        gate: "pass", "fails: ..." or "not run: ...".
        computes: description of its outputs.
        spread_ms: first and third quartile of the rounds.
        rounds: number of rounds.
        host_ms: median time until the host had queued the call.
        launches: number of launches on the device.
        kernels: for our CUDA backend, "ring" (one read, one write) or "sweeps".
        bytes, flops: the case's minimum; for a ceiling, its own.
        moved_bytes: bytes moved by the implementation's own byte model, if it has one.
        phases_ms: parts of a whole step.
        date, commit: date and commit of the measurement.
    """

    case: str
    impl: str
    median_ms: float | None
    floor_ms: float | None
    ratio_to_floor: float | None
    ratio_to_ours: float | None
    peak_mb: float | None
    gate: str
    computes: str
    spread_ms: list[float] | None = None
    rounds: int = 0
    host_ms: float | None = None
    launches: int | None = None
    kernels: str | None = None
    bytes: int | None = None
    flops: int | None = None
    moved_bytes: int | None = None
    phases_ms: dict[str, float] | None = None
    date: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.case, self.impl

    @property
    def ceiling(self) -> bool:
        return self.impl.startswith("ceiling: ")

    @property
    def ours(self) -> bool:
        return self.impl.startswith("ours")


@dataclass
class Machine:
    """The machine and versions, the same for every record of a file."""

    machine: str  # name of the GPU or the processor
    device_type: str
    system: str
    processors: int
    threads: int
    driver: str | None
    versions: dict[str, str]

    def comparable(self, other: Machine) -> bool:
        """Whether figures of both can be combined in one file: everything but the installed peers is the same."""
        shared = self.versions.keys() & other.versions.keys()
        same = all(self.versions[name] == other.versions[name] for name in shared)
        return same and replace(self, versions={}) == replace(other, versions={})

    @property
    def folder(self) -> str:
        """Name of its folder in bench/results: "NVIDIA H200" -> "h200"."""
        name = self.machine if self.device_type == "cuda" else f"cpu {self.machine}"
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\b(nvidia|geforce)\b", "", name.lower())).strip("-")


def this_machine(device: torch.device, peers: dict[str, str]) -> Machine:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    on_gpu = device.type == "cuda"
    return Machine(
        machine=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        device_type=device.type,
        system=f"{platform.system()} {platform.machine()}",
        processors=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        versions={**versions, **peers},
    )


def _processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc") else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checked-out commit, with "+" if the code differs; EPO_COMMIT if there is no repository."""
    root = str(Path(__file__).parent.parent)
    head = _output("git", "-C", root, "rev-parse", "--short", "HEAD")
    if head is None:
        return os.environ.get("EPO_COMMIT", "unknown")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", "epo_kernels", "csrc")
    return f"{head}+" if changed else head


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write(path: Path, machine: Machine, records: list[Record]) -> None:
    """Write atomically, because a run may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [asdict(machine), *({k: _rounded(v) for k, v in asdict(record).items()} for record in records)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in content) + "\n]\n")
    os.replace(temporary, path)


def read(path: Path) -> tuple[Machine, list[Record]]:
    """The machine and the records of a file written by `write`.

    Raises:
        ValueError: the file contains something else; the message says what.
    """
    try:
        first, *others = json.loads(path.read_text())
        known = {field.name for field in fields(Record)}
        for entry in others:
            if unknown := set(entry) - known:
                raise ValueError(f"a record has unknown fields {sorted(unknown)}")
        return Machine(**first), [Record(**entry) for entry in others]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of a machine and its records ({error}); measure again") from error


def merged(path: Path, machine: Machine, records: list[Record]) -> tuple[Machine, list[Record]]:
    """The file's records, updated with the new ones; only the new ones if the file is from another machine."""
    if not path.exists():
        return machine, records
    before, old = read(path)
    if not before.comparable(machine):
        return machine, records
    fresh = {record.key: record for record in records}
    kept = [fresh.pop(record.key, record) for record in old]
    return replace(machine, versions=before.versions | machine.versions), kept + list(fresh.values())


def _rounded(value: Any) -> Any:
    """Floats to five significant digits; no figure is more precise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return value
