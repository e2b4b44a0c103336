"""python -m epo_kernels.train alfworld, end to end."""

import json
import os
import subprocess
import sys

import pytest

from epo_kernels.train.__main__ import main
from epo_kernels.train.envs.alfworld.suite import EMBEDDED_FORMAT


def test_a_run_on_authored_games(tmp_path):
    small = ["steps=1", "model.warm_start={demonstrations: 2, epochs: 1}", "env.max_turns=30", "evaluate.episodes=2"]
    small += ["algorithm.groups=1", "algorithm.group_size=2", "rollout.environments=2", f"run_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "epo_kernels.train", "alfworld", *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["training/global_step"] == 1
    panels = {record["panel"] for record in json.loads((tmp_path / "run" / "evaluation.json").read_text())}
    assert panels == {"train", "iid", "ood"}


def test_a_dry_run_takes_the_games_of_the_cache(data, tmp_path, monkeypatch, capsys):
    def author(*_, **__):
        pytest.fail("the games are there")

    games = tmp_path / "cache" / f"alfworld-games-{EMBEDDED_FORMAT}"
    games.parent.mkdir()
    games.symlink_to(data)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.delenv("ALFWORLD_DATA")
    monkeypatch.setattr("epo_kernels.train.envs.alfworld.suite.author_games", author)
    settings = [f"env.cache_dir={games.parent}", f"run_dir={tmp_path}/run", "env.max_turns=30"]
    assert main(["alfworld", *settings, "--dry-run"]) == 0
    assert "6 training tasks" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
