"""The examples run and learn as described. (The TRL example runs in tests/integrations.)"""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = [EXAMPLES.parent / "docs" / name for name in ("loss.md", "trl.md", "verl.md")]


def test_the_bare_loop_learns():
    rewards = runpy.run_path(str(EXAMPLES / "bare_loop.py"))["main"]()
    assert rewards[0] < 0.6
    assert sum(rewards[-5:]) / 5 > 0.9


WITH_A_LOSS = [file for file in EXAMPLES.glob("*.py") if file.name != "my_environment.py"]


@pytest.mark.parametrize("file", [*WITH_A_LOSS, *PAGES], ids=lambda file: file.name)
def test_a_restoring_band_holds_turns(file):
    """docs/entropy_control.md: "segment" whenever αβk > 1 or κ_l > 0."""
    text = file.read_text()
    calls = re.findall(r"EPO(?:Trainer)?Config\(([^()]*)\)", text) + re.findall(
        r"main_ppo \\\n(.*?)```", text, re.DOTALL
    )
    assert calls or "EPOConfig.restoring()" in text
    for arguments in calls:
        settings = {name: float(value) for name, value in re.findall(r"(penalty_alpha|band_low)=([\d.]+)", arguments)}
        if settings.get("penalty_alpha", 0) > 1 or settings.get("band_low", 0) > 0:
            assert re.search(r"band_scope=\"?segment", arguments), arguments
    if re.search(r"bounds\(turns, low=0\.[1-9]", text):
        assert "EPOConfig.restoring()" in text
        assert "segment_ids" in text
