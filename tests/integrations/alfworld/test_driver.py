"""python -m epo_kernels.train alfworld, from end to end."""

import json
import os
import subprocess
import sys


def test_a_run_on_authored_games(tmp_path):
    small = ["steps=1", "model.warm_start={demonstrations: 2, epochs: 1}", "env.max_turns=30", "evaluate.episodes=2"]
    small += ["algorithm.groups=1", "algorithm.group_size=2", "rollout.environments=2", f"run_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "epo_kernels.train", "alfworld", *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["training/global_step"] == 1
    panels = {record["panel"] for record in json.loads((tmp_path / "run" / "evaluation.json").read_text())}
    assert panels == {"iid", "ood"}
