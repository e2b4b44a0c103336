"""The pages' code runs, their commands parse, their links resolve, and the notebook runs from top to bottom."""

import json
import re
import shlex
from pathlib import Path

import pytest

from epo_kernels.train.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)")


def blocks_of(page, language):
    return [(title, code) for kind, title, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    """Blocks that need another package are only compiled; tests/integrations runs such code."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for title, code in blocks_of(page, "python"):
        compiled = compile(code, str(page), "exec")
        if "needs" not in title:
            exec(compiled, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_driver_parse(page, tmp_path):
    lines = [line for _, code in blocks_of(page, "") for line in code.replace("\\\n", " ").splitlines()]
    commands = [line.partition("-m epo_kernels.train ")[2] for line in lines if "-m epo_kernels.train " in line]
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if not word.startswith("--")]
        files_of_users = [word for word in words if word.endswith(".yaml")]
        sources = ["practice"] if files_of_users else [word for word in words if "=" not in word]
        settings = [word for word in words if "=" in word]
        if any(re.match(r"env\.name=.*:", word) for word in settings):  # run by test_extending.py
            continue
        load_config(sources, [*settings, f"run_dir={tmp_path}"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_yaml_blocks_are_settings(tmp_path):
    (block,) = blocks_of(ROOT / "docs" / "training.md", "yaml")
    (tmp_path / "my_run.yaml").write_text(block[1])
    config = load_config([str(tmp_path / "my_run.yaml")], [])
    assert config.steps == 100


def test_the_notebook_runs(monkeypatch, capsys):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    cells = json.loads((ROOT / "examples" / "ten_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "ten_minutes.ipynb", "exec"), names)
    plt.close("all")
    eager, fused = names["eager"], names["fused"]
    assert float(eager[0]) == pytest.approx(float(fused[0]), rel=1e-5)
    assert (eager[1] - fused[1]).abs().max() < 1e-6
    assert names["collapsing"][-1].mean() < 0.5 * names["held"][-1].mean()
    assert "entropy at the end" in capsys.readouterr().out
