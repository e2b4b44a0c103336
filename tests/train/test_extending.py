"""The recipes of docs/extending.md, followed literally."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
QUICK = ["steps=2", "model.warm_start.epochs=4", "algorithm.groups=2", "algorithm.group_size=2", "evaluate.episodes=2"]


def test_the_environment_trains_as_the_recipe_says(tmp_path):
    code, commands = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()
    (tmp_path / "my_env.py").write_text(code)

    def run(command, *settings):
        _, *arguments = shlex.split(command)
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        call = [sys.executable, *arguments, *settings]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    training, asking = commands.strip().splitlines()
    run(training, *QUICK)
    lines = (tmp_path / "runs" / "guess" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["training/global_step"] for line in lines] == [1, 2]
    records = json.loads((tmp_path / "runs" / "guess" / "evaluation.json").read_text())
    assert {record["panel"] for record in records} == {"odd"}
    assert "env.options.highest=8" in run(asking)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.(?:py|h))`", PAGE)) - {"epo_kernels/train/io/my_tracker.py"})
)
def test_the_places_to_touch_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "name", ["_TURN_ADVANTAGES", "_assign_gae", "WeightsAndBiases", "class Board", "TrackingConfig"]
)
def test_the_names_to_look_for_exist(name):
    assert name.removeprefix("class ") in PAGE
    assert any(name in path.read_text() for path in (ROOT / "epo_kernels" / "train").rglob("*.py"))
