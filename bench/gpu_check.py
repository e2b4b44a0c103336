"""Everything that needs a GPU, in one call: `make gpu-check OUT=folder`.

For a bare machine with PyTorch and without network. Builds the native part in place, runs the GPU tests beside
compute-sanitizer, then the benchmarks, alone and in order of importance, until the budget is used up. A failed stage is
reported and the others still run. Writes results.json, report.md, plots and log.txt to the folder, and finally prints
tables. A second call with the same folder continues the benchmarks:
`make gpu-check ARGS="--only benchmarks report --budget 200"`.

To keep the figures: `python -m bench.report --results folder/results.json --keep`.

Environment:
    EPO_WHEELS: a folder of wheels to install for this call only: other libraries in the versions listed in peers.py,
        and omegaconf for the whole-step benchmark. `pip download --no-deps --only-binary=:all: --python-version 3.12
        -d folder trl==1.16.0 ...` fetches them on a machine with network.
    EPO_COMMIT: the commit to record if there is no repository.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET_SECONDS = 560  # of the ten minutes that such a machine allows per command
REPORT_SECONDS = 20  # reserved
SECONDS = "{seconds}"  # in a command: its time limit, minus a margin to end by itself
_LEAVE_SECONDS = 10.0
_TAIL_LINES = 25
DEVICE_LOST_EXIT = 3  # exit code of the benchmarks: see conftest.py


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: name in the table.
        command: None if there is nothing to run; `note` says why.
        limit: seconds; less if less of the budget is left.
        environment: added to the process's environment.
        again_on: exit code after which the command is repeated, at most twice.
        beside: it runs at the same time as the stage before it.
        reserved: seconds of the budget that are kept for it while earlier stages run.
    """

    name: str
    command: tuple[str, ...] | None
    limit: float = 60.0
    note: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    again_on: int | None = None
    beside: bool = False
    reserved: float = 0.0


@dataclass(frozen=True)
class Outcome:
    stage: str
    status: str  # ok | failed: ... | skipped: ...
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status.startswith("failed")


def run_stages(stages: Sequence[Stage], log: Path, budget: float) -> list[Outcome]:
    """Run the stages in order, even if some fail."""
    end = time.monotonic() + budget
    outcomes: list[Outcome] = []
    while len(outcomes) < len(stages):
        rest = stages[len(outcomes) :]
        together = [rest[0], *itertools.takewhile(lambda stage: stage.beside, rest[1:])]
        left = end - time.monotonic() - sum(stage.reserved for stage in rest[len(together) :])
        # A log each, so that the output of stages beside each other does not mix.
        logs = [log.with_name(f"{log.stem}-{stage.name.replace(' ', '-')}.txt") for stage in together]
        with ThreadPoolExecutor(len(together)) as pool:
            found = list(pool.map(_run, together, logs, itertools.repeat(left)))
        for outcome, own in zip(found, logs, strict=True):
            print(f"{outcome.stage}: {outcome.status} ({outcome.seconds:.0f} s)", flush=True)
            if not own.exists():
                continue
            if outcome.failed:
                print(_tail(own), flush=True)
            with log.open("a") as output:
                output.write(own.read_text(errors="replace"))
            own.unlink()
        outcomes += found
    return outcomes


def _run(stage: Stage, log: Path, left: float) -> Outcome:
    if stage.command is None:
        return Outcome(stage.name, f"skipped: {stage.note}", 0.0)
    if left < 5.0:
        return Outcome(stage.name, "skipped: no time left", 0.0)
    began = time.monotonic()
    limit = min(stage.limit, left)
    status = ""
    for _ in range(3):
        status = _run_once(stage, log, limit - (time.monotonic() - began))
        if stage.again_on is None or status != f"failed: exit code {stage.again_on}":
            break
    return Outcome(stage.name, status, time.monotonic() - began)


def _run_once(stage: Stage, log: Path, limit: float) -> str:
    assert stage.command is not None
    command = [part.replace(SECONDS, f"{max(limit - _LEAVE_SECONDS, 1.0):.0f}") for part in stage.command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    with log.open("a") as output:
        output.write(f"\n===== {stage.name}: {' '.join(command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its child processes can be ended with it
                preexec_fn=_heed_interrupts,
            )
        except OSError as error:
            return f"failed: {error}"
        try:
            code = process.wait(timeout=max(limit, 1.0))
        except subprocess.TimeoutExpired:
            _end(process)
            return f"failed: took more than {limit:.0f} s"
    return "ok" if code == 0 else f"failed: exit code {code}"


def _heed_interrupts() -> None:
    """A shell starts background commands with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> None:
    for sign, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 5.0)):  # interrupted, pytest reports its failures
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def plan(out: Path, dry: bool, budget: float, site: Path, bench_arguments: Sequence[str]) -> list[Stage]:
    """The stages. dry: the same orchestration on a CPU with tiny cases, about a minute in total."""
    python = sys.executable
    device = "cpu" if dry else "cuda"
    wheels = sorted(map(str, Path(os.environ["EPO_WHEELS"]).glob("*.whl"))) if os.environ.get("EPO_WHEELS") else []
    pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    tests = (
        ("tests/test_schedule.py",) if dry else ("-m", "gpu", "tests", "--ignore=tests/train", "--ignore=tests/bench")
    )
    # GPU tests mostly compile, and compute their truth on the CPU.
    workers = ("-n", str(min(os.cpu_count() or 1, 12))) if find_spec("xdist") and not dry else ()
    # A kernel that hangs costs its worker, not the stage.
    patience = ("--timeout=40", "--timeout-method=thread") if find_spec("pytest_timeout") and not dry else ()
    pytest = (python, "-m", "pytest", "-q", "-rf", "--continue-on-collection-errors", *workers, *patience, *tests)
    bench: tuple[str, ...] = (
        python,
        "-m",
        "pytest",
        "bench",
        "-q",
        "-p",
        "no:xdist",
        "-rsfE",
        "--benchmark-columns=median,iqr,rounds",
    )
    bench += (f"--bench-out={out}", f"--bench-device={device}", "--bench-resume", f"--bench-budget={SECONDS}")
    bench += ("--bench-suite=tiny", "--bench-seconds=0.1", "--bench-threads=1") if dry else ("--bench-seconds=2",)
    build = (python, "-m", "bench.gpu_check", "--build")
    require = ("cpu",) if dry else ("cuda", "triton")
    report = (python, "-m", "bench.report", f"--results={out / 'results.json'}", f"--out={out}")
    return [
        Stage("machine", (python, "-m", "bench.gpu_check", "--describe"), 30),
        Stage("wheels", (*pip, *wheels) if wheels else None, 60, "no EPO_WHEELS folder with wheels is given"),
        Stage("build", None if dry else build, 100, "dry"),
        Stage("backends", (python, "-m", "bench.gpu_check", "--require", *require), 30),
        Stage("tests", pytest, 120),
        _sanitizer("memcheck", dry, python, device),
        _sanitizer("racecheck", dry, python, device),
        Stage("benchmarks", (*bench, *bench_arguments), budget, again_on=DEVICE_LOST_EXIT),
        Stage("report", report, 60, reserved=REPORT_SECONDS),
    ]


def _sanitizer(tool: str, dry: bool, python: str, device: str) -> Stage:
    call = (python, "-m", "bench.sanitize", f"--device={device}", f"--seconds={SECONDS}")
    if dry:
        return Stage(tool, call, beside=True)
    found = shutil.which("compute-sanitizer")
    # Without PyTorch's cache every tensor is a separate allocation, whose bounds the tool knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (found, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *call) if found else None
    return Stage(tool, command, 120, "compute-sanitizer is not installed", environment, beside=True)


def architecture() -> str:
    """The device's compute capability in the build's format, such as "90a"; "" if unknown: the default list."""
    try:
        query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    number = answer.split()[0].replace(".", "") if answer.split() else ""
    return "90a" if number == "90" else number


def build(package: Path = ROOT / "epo_kernels", folder: Path = ROOT / "build" / "gpu-check", *options: str) -> None:
    """Build the native module into the package, for this device only, with CMake as described in CMakeLists.txt.

    setup.py would do the same, but requires a setuptools version that bare machines may not have.
    """
    import pybind11

    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    known = {"pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": sys.executable}
    if device := architecture():
        known["EPO_CUDA_ARCHS"] = device
    arguments = [f"-D{name}={value}" for name, value in known.items()]
    if shutil.which("ninja"):
        arguments.append("-GNinja")
    subprocess.run([cmake, "-S", ROOT, "-B", folder, *arguments, *options], check=True)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", folder, "--target", "_native", "--parallel", jobs], check=True)
    for module in folder.glob("_native*.so"):
        shutil.copy2(module, package)


def describe() -> None:
    """Machine and versions, for the log."""
    import torch

    print(sys.version)
    print("torch", torch.__version__, "cuda", torch.version.cuda, torch.cuda.is_available())
    for command in (("nvidia-smi",), ("nvcc", "--version"), (sys.executable, "-m", "pip", "list")):
        if shutil.which(command[0]):
            subprocess.run(command, timeout=30)


def missing(names: Sequence[str]) -> list[str]:
    """The reasons why backends cannot run, for those that cannot. A failed build warns and keeps the others."""
    import epo_kernels as ek

    known = ek.available_backends()
    return [f"{name}: {known.get(name, 'unknown')}" for name in names if known.get(name, "unknown") is not None]


def stages_table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| stage | status | s |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {o.stage} | {o.status} | {o.seconds:.0f} |" for o in outcomes)])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if no stage failed, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "build" / "gpu-check-results", help="output folder")
    parser.add_argument("--dry", action="store_true", help="test the orchestration on a CPU with tiny cases")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="total seconds")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    parser.add_argument("--bench", default="", metavar="ARGS", help="arguments for pytest: --bench='-k linear'")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--require", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.describe:
        describe()
        return 0
    if options.build:
        build()
        return 0
    if options.require:
        reasons = missing(options.require)
        print("\n".join(reasons) or "all backends are available")
        return int(bool(reasons))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"  # nvcc, compute-sanitizer
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, str(ROOT), os.environ.get("PYTHONPATH"))))
        stages = plan(out, options.dry, options.budget, Path(folder), shlex.split(options.bench))
        chosen = [stage for stage in stages if not options.only or stage.name in options.only]
        outcomes = run_stages(chosen, out / "log.txt", options.budget)
        table = stages_table(outcomes)
        report = out / "report.md"
        if report.exists():
            report.write_text(f"{report.read_text()}\n## Stages\n\n{table}\n")
        print(table)
        if (out / "results.json").exists():
            summary = (sys.executable, "-m", "bench.report", f"--results={out / 'results.json'}", "--print")
            print(subprocess.run(summary, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
