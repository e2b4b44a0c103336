"""The examples run, and learn what they say they learn. (TRL's runs under tests/integrations.)"""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_bare_loop_learns():
    rewards = runpy.run_path(str(EXAMPLES / "bare_loop.py"))["main"]()
    assert rewards[0] < 0.6
    assert sum(rewards[-5:]) / 5 > 0.9
