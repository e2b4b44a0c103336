"""The quick start: its frozen data, and its section of the evidence page."""

from dataclasses import replace

import pytest

from bench import evidence, evidence_page, experiments, quickstart_page
from bench.quickstart_evidence import SEEDS

RUN = quickstart_page.Run(
    seed=0,
    successes={
        "sampled": {"before": [True, False, False, None], "after": [True, True, False, True]},
        "greedy": {"before": [False] * 4, "after": [False] * 4},
    },
    cpu_seconds=120.4,
    seconds=150.0,
    load=1.5,
    date="2026-11-25",
    commit="abc1234",
    machine="x86_64, 2 cores",
)


def test_page_is_in_step_with_the_results():
    results = {name: found for name in experiments.EXPERIMENTS if (found := experiments.read(name))}
    curves = {name: found for name in results if (found := evidence.curves_of(name))}
    page = evidence_page.page(results, curves, quickstart_page.read())
    assert page == evidence.PAGE.read_text(), "run: python -m bench.evidence --report"


def test_section_leaves_lost_episodes_out():
    text = quickstart_page.section([RUN, replace(RUN, seed=1)])
    assert "| sampled | 6 | +33.3 (+" in text
    assert "| greedy | 8 | +0.0 (+0.0 to +0.0) | the interval" in text
    assert "| 1 | sampled | 33.3 (6.1 to 79.2) | 75.0 (30.1 to 95.4) | +33.3 (+0.0 to +100.0) | 120 |" in text


def test_committed_results_are_whole_and_rise():
    runs = quickstart_page.read()
    assert [run.seed for run in runs] == list(SEEDS)
    for run in runs:
        moments = [run.successes[d][when] for d in quickstart_page.DECODINGS for when in ("before", "after")]
        assert [len(moment) for moment in moments] == [63] * 4
        before, after = moments[:2]
        assert sum(map(bool, after)) > sum(map(bool, before))


@pytest.mark.parametrize("name", ["data", "evidence"])
def test_commands_are_documented(name):
    makefile = (evidence.ROOT / "Makefile").read_text()
    assert f"quickstart-{name}: venv\n\t$(RUN) -m bench.quickstart_{name}\n" in makefile
