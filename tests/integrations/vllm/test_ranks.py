"""Two processes with sharded layers, each with its own engine."""

import json
import os
import subprocess
import sys

from tests.train.conftest import SMALL, lines_of


def test_every_rank_samples_with_whole_weights(tmp_path):
    settings = ["rollout.engine=vllm", "rollout.vllm.cpu_cache_gb=0.1", "model.fsdp=true", "optim.lr=1e-3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "-m",
        "epo_kernels.train",
        "practice",
        *SMALL,
        *settings,
        "evaluate.episodes=1",
        "evaluate.decoding=[greedy]",
        f"run_dir={tmp_path}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path)
    assert [line["training/global_step"] for line in lines] == [1, 2]
    assert all(0 < line["training/rollout_probs_diff_max"] < 1e-5 for line in lines)
    # A single episode: the other rank has nothing to play, but takes part in the collectives.
    assert len(json.loads((tmp_path / "evaluation.json").read_text())) == 2
