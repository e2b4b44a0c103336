"""The example script, as its reader would run it."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "examples" / "trl_epo.py"


def test_the_example_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(SCRIPT))["main"]()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[-1] > 1.5 * rewards[0]
    assert trainer.history.means()[0] > 0
