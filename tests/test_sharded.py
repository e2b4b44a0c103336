"""A vocabulary split over ranks, data-parallel ranks and DTensors, on 2 and 4 processes: cases in tests/sharded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sharded.launch import run_on_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp2.py"


def assert_no_failures(failures):
    told = [f"{case}, rank {rank}:\n{text}" for rank, failed in enumerate(failures) for case, text in failed.items()]
    assert not told, "\n".join(told)


# One test for all cases: a rank takes seconds to start.
@pytest.mark.parametrize("world", [2, 4])
def test_on_ranks(world, tmp_path):
    assert_no_failures(run_on_ranks(["vocabulary", "data_parallel"], world, tmp_path))


def test_a_rank_that_dies_gives_the_others_an_error(tmp_path):
    """Within the timeout of their group, which is 60 seconds here: a hang would be killed and have no report."""
    *survivors, dead = run_on_ranks(["dying"], 3, tmp_path, dies=2)
    assert_no_failures(survivors)
    assert dead is None


def test_the_fsdp2_example_runs():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLE]

    def run():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    told = run()
    if "(SIGABRT)" in told.stderr:
        told = run()  # DTensor's caches keep gloo's threads, which now and then abort a rank at its interpreter's end
    assert told.returncode == 0, told.stderr
    losses = re.findall(r"-?\d+\.\d{4}", told.stdout)
    assert len(losses) == 3, told.stdout


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus(tmp_path):
    assert_no_failures(run_on_ranks(["gpus"], 2, tmp_path, device="cuda"))
