"""Data parallel over two processes (gloo): TRL's run where EPO is off, and one history for all ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_two_ranks(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("ranks.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(script), folder, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["off_by"] < 1e-5 < 1e-3 < first["moved"]
    assert first["controls_off_by"] < 1e-5
    assert first["coefficients"][0] == first["coefficients"][1] == second["coefficients"][1]
    assert first["entropies"][1] == second["entropies"][1] == pytest.approx(first["entropies"][0])
    assert first["sum"] == second["sum"], "the ranks hold the same weights"
    assert first["total"] == second["total"], "and the same history"
    assert first["steps"] == 2, "a step of it is a generation of both ranks"
    # What TRL counts over both ranks, but for its 64 prompts of 2 or 3 tokens
    assert 64 * 2 <= first["tokens"] - first["total"][1] <= 64 * 3
    assert first["penalty"] == pytest.approx(second["penalty"])
