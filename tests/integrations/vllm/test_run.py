"""A whole run with vLLM rollouts: trained, killed midway, resumed."""

import json
import signal
import subprocess
import sys
import time

from epo_kernels.train.__main__ import main
from epo_kernels.train.io.checkpoint import list_checkpoints, step_of
from tests.train.conftest import SMALL, lines_of

STEPS = 6
SETTINGS = [*SMALL, f"steps={STEPS}", "rollout.engine=vllm", "rollout.vllm.cpu_cache_gb=0.1", "optim.lr=1e-3"]


def test_a_run_killed_on_the_way_goes_on(tmp_path, capfd):
    command = ["practice", *SETTINGS, f"run_dir={tmp_path}"]
    kill_after(2, tmp_path / "metrics.jsonl", command)  # the first one's checkpoint is there
    done = step_of(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert 1 <= done < STEPS
    capfd.readouterr()
    assert main(command) == 0
    lines = lines_of(tmp_path)
    assert [line["training/global_step"] for line in lines] == list(range(1, STEPS + 1))
    # Weights move at every step: a rollout from those of the step before, or of before the kill, would show.
    assert all(0 < line["training/rollout_probs_diff_max"] < 1e-5 for line in lines)
    assert all(line["actor/grad_norm"] > 0 and line["actor/lr"] > 0 for line in lines)
    whens = {record["when"] for record in json.loads((tmp_path / "evaluation.json").read_text())}
    assert whens == {"before", "after"}
    shown = "".join(capfd.readouterr())
    assert f"{STEPS - done} of {STEPS} steps to do" in shown
    assert "INFO" not in shown
    ours = shown.lower().replace(str(tmp_path).lower(), "").replace("rollouts by vllm", "", 1)  # of the run's header
    assert "vllm" not in ours


def kill_after(steps, metrics, command):
    with subprocess.Popen([sys.executable, "-m", "epo_kernels.train", *command], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        try:
            while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
                assert time.monotonic() < deadline, f"the run didn't reach step {steps}"
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
