"""Does `make train` show learning every time? Its command with five fresh seeds: make quickstart-evidence.

Success before and after each run goes to bench/results/evidence/quickstart.json, from which docs/evidence.md is
generated. All runs count. If interrupted, the same command continues with the missing seeds.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench.evidence import commit, cpu_seconds, write_page
from bench.experiments import RESULTS
from bench.quickstart_page import DECODINGS, FILE, Run, read
from epo_kernels.train.io.tracking import read_evaluation, write_atomically

SEEDS = (0, 1, 2, 3, 4)
RUNS = Path("runs/quickstart_evidence")


def main() -> int:
    path = RESULTS / FILE
    runs = read()
    for seed in SEEDS:
        if seed not in {run.seed for run in runs}:
            runs.append(run_one(seed))
            lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
            write_atomically(path, f"[\n{lines}\n]\n")
    write_page()
    return 0


def run_one(seed: int) -> Run:
    """Run `make train` with a seed.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    place = RUNS / str(seed)
    command = [sys.executable, "-m", "epo_kernels.train", "quickstart", f"seed={seed}", f"run_dir={place}"]
    begun, spent = time.perf_counter(), cpu_seconds()
    subprocess.run([*command, "resume=never"], check=True)
    return outcome(place, seed, cpu_seconds() - spent, time.perf_counter() - begun, os.getloadavg()[1])


def outcome(place: Path, seed: int, cpu: float, seconds: float, load: float) -> Run:
    """The record of a complete run in the folder `place`."""
    records = {(record.decoding, record.when): record.successes for record in read_evaluation(place)}
    return Run(
        seed=seed,
        successes={d: {when: records[d, when] for when in ("before", "after")} for d in DECODINGS},
        cpu_seconds=round(cpu, 1),
        seconds=round(seconds, 1),
        load=round(load, 1),
        date=datetime.now(UTC).date().isoformat(),
        commit=commit(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
    )


if __name__ == "__main__":
    sys.exit(main())
