"""The page on entropy control: its tables and the figures in its text match the library's results."""

import re
import sys
from pathlib import Path

import pytest
import torch

import epo_kernels as ek

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def page():
    return (DOCS / "entropy_control.md").read_text()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(DOCS))
    import entropy_control

    sys.path.remove(str(DOCS))
    return entropy_control


def test_the_tables_are_the_librarys(page, script):
    number = r"(?<![\w.])[+-]?\d+(?:\.\d+)?"
    made = script.written(page)
    assert re.sub(number, "#", made) == re.sub(number, "#", page)
    found, expected = (list(map(float, re.findall(number, text))) for text in (page, made))
    assert found == pytest.approx(expected, rel=0.02, abs=0.03)  # a chattering token rests elsewhere on other machines


def test_the_papers_hinge_never_reverses(page, script):
    settings = [ek.EPOConfig.paper(env) for env in ("scienceworld", "alfworld")]
    weights = [ek.phase_weight(step, 150, "paper") for step in range(150)]
    assert [cfg.penalty_alpha for cfg in settings] == [0.05, 0.1]
    assert max(cfg.penalty_alpha * cfg.smooth_coeff * weight for cfg in settings for weight in weights) == 0.2
    assert "The paper's α is 0.05 (ScienceWorld) or 0.1 (ALFWorld)" in page
    assert "αβk is at most 0.2: the bonus above the band shrinks to 80 %" in page
    name = "hinge, α 0.1, β 2 (paper)"
    pushed = script.pushes(torch.linspace(0, 4.1, 100), *script.CONTROLS[name], low=0.0)
    assert float(pushed.min()) == pytest.approx(0.8)
    assert float(pushed.max()) == 1.0  # with κ_l = 0 the lower side never acts


def test_a_constant_penalty_has_no_gradient(script):
    entropies = torch.linspace(0, 4, 50)
    pushed = [
        script.pushes(entropies, *script.CONTROLS[name]) for name in ("none", "indicator, α 0.1 (published code)")
    ]
    assert torch.equal(*pushed)


def test_the_restoring_preset_is_the_hinge_of_the_page(page, script):
    restoring, drawn = ek.EPOConfig.restoring(), script.CONTROLS["hinge, α 2 (restoring)"][0]
    assert (restoring.penalty, restoring.penalty_alpha, restoring.smooth_coeff) == ("hinge", 2.0, 1.0)
    assert (drawn.penalty, drawn.penalty_alpha, drawn.smooth_coeff) == ("hinge", 2.0, 1.0)
    low, high = script.pushes(torch.tensor([0.2, 3.0]), drawn, 1.0).tolist()
    assert (low, high) == (3.0, -1.0)
    assert "the push becomes -1 above the band and triples below" in page


def test_where_the_quadratic_rests(page, script):
    control = script.CONTROLS["quadratic, α 2"]
    assert "With α = 2 its push crosses zero 0.25 nats above the" in page
    assert float(script.pushes(torch.tensor([script.HIGH + 0.25]), *control)) == pytest.approx(0.0, abs=1e-6)
    assert "(-7 at 4 nats)" in page
    assert float(script.pushes(torch.tensor([4.0]), *control)) == pytest.approx(-7.0)


def test_the_gate_is_slow_below(page, script):
    steps = {
        name: int((script.courses(*script.CONTROLS[name])[:, 0] < script.LOW).sum()) for name in ("none", "gate, α 0.1")
    }
    assert steps["gate, α 0.1"] / steps["none"] == pytest.approx(10, rel=0.1)
    assert "ten times as long" in page


def test_the_picture_can_be_drawn(script, tmp_path):
    script.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    assert (DOCS / "entropy_control.png").is_file()
