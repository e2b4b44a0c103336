"""Tables match the records; README and docs match the committed results."""

from dataclasses import replace

import pytest

from bench import records, report
from tests.bench.test_records import MACHINE, record

RECORDS = [
    record("loss/qwen2.5-3b/8192/bf16/100%", "ours:cuda", 1.31, bytes=4_978_638_848, floor_ms=1.16, flops=0),
    record("loss/qwen2.5-3b/8192/bf16/100%", "ours:triton", 1.74),
    record("loss/qwen2.5-3b/8192/bf16/100%", "eager", 16.3, peak_mb=40_000.0),
    record("loss/qwen2.5-3b/8192/bf16/100%", "TRL logprob_entropy", 2.4),
    record("loss/qwen2.5-3b/8192/bf16/100%", "quack cross_entropy", None, gate="fails: loss is off by 2.0e-01"),
    record("loss/qwen2.5-3b/8192/bf16/100%", "ceiling: copy", 1.16),
]


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_are_in_step_with_the_results(page):
    text = page.read_text()
    assert report.with_section(text, report.PAGES[page]()) == text, "run: python -m bench.report --pages"


def test_reports_are_in_step_with_the_results():
    for path in report.RESULTS.glob("*/results.json"):
        tables = (path.parent / "report.md").read_text()
        assert report.full_report(*records.read(path)) in tables, "run: python -m bench.report"


def test_section_changes_with_a_figure(tmp_path):
    records.write(tmp_path / "h200" / "results.json", MACHINE, RECORDS)
    section = report.performance_page(tmp_path)
    assert "1.31 (cuda)" in section
    assert "2.40 (TRL logprob_entropy)" in section
    assert "2026-11-21, commit abc1234" in section
    readme = report.with_section(f"before\n{report.BEGIN}\n{report.END}\nafter\n", section)
    records.write(tmp_path / "h200" / "results.json", MACHINE, [replace(RECORDS[0], median_ms=1.5), *RECORDS[1:]])
    assert report.with_section(readme, report.performance_page(tmp_path)) != readme


def test_section_without_results_says_how_to_get_them(tmp_path):
    assert "No figures are committed yet" in report.performance_page(tmp_path)


def test_headlines_are_ratios_of_one_run(tmp_path):
    named = "loss/qwen2.5-3b/128/fp32/100%"
    found = [record(named, "ours:cpu", 2.0, floor_ms=1.0, peak_mb=10.0), record(named, "eager", 30.0, peak_mb=50.0)]
    records.write(tmp_path / "cpu" / "results.json", MACHINE, found)
    assert "| 15 × | – | 5.0 × |" in report.headline_table(tmp_path)


def test_a_page_without_markers_is_rejected():
    with pytest.raises(ValueError, match="performance: begin"):
        report.with_section("nothing here", "section")


def test_full_report_drops_nothing():
    text = report.full_report(MACHINE, RECORDS)
    assert "Floor 1.16 ms: 4.98 GB." in text
    assert "fails: loss is off by 2.0e-01" in text
    assert "| ours:cuda | 1.31 | 1.28 – 1.34 | 2.00 |" in text
    # Cases skipped for the budget are listed.
    assert "- linear-loss/d4096-v131072/8192/bf16/100%" in text.partition("## Not measured")[2]


def test_the_full_report_says_which_cuda_kernels_ran():
    text = report.full_report(MACHINE, [record(impl="ours:cuda", kernels="sweeps")])
    assert "(sweeps) |" in text


def test_a_failing_backend_of_ours_is_shown_in_the_summary():
    failing = [record(impl="ours:cuda", median=None, gate="fails: wrong"), record(impl="eager", median=5.0)]
    assert "fails: wrong" in report.summary_table(failing)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (0.001234, "0.00123"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value, shown):
    assert report.number(value) == shown


def test_report_and_plots_are_written(tmp_path):
    results = tmp_path / "results.json"
    linear = record("linear-loss/tiny/64/fp32/100%", "ours:cpu", 2.0, bytes=1000, flops=100_000)
    others = [record(name, "ours:cuda") for name in ("loss/llama-2-7b/8192/bf16/100%", "loss/qwen3.5/8192/bf16/100%")]
    records.write(results, MACHINE, [*RECORDS, linear, *others])
    report.write_report(results, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "roofline.png", "time_against_vocabulary.png"}
    assert "![roofline](roofline.png)" in (tmp_path / "out" / "report.md").read_text()


def test_policy_losses_are_shown_relative_to_ppo(tmp_path):
    case = "loss/qwen2.5-3b/128/fp32/100%/policies"
    found = [
        record(case, "ours:cpu ppo", 10.0, spread_ms=[9.5, 10.5]),
        record(case, "ours:cpu gspo", 13.3, spread_ms=[13.0, 14.0]),
        record(case, "ours:cpu vespo", None, gate="fails: loss is off by 2.0e-01"),
        record(case, "ceiling: copy", 1.0),
    ]
    records.write(tmp_path / "cpu" / "results.json", MACHINE, found)
    section = report.performance_page(tmp_path)
    assert "| policy loss | loss/qwen2.5-3b/128/fp32/100% (cpu) |" in section
    assert "| ppo | 1.00 (0.95 – 1.05) |" in section
    assert "| gspo | 1.33 (1.30 – 1.40) |" in section
    assert "| vespo | fails |" in section
    assert "| case |" not in section, "no case compares the library with anything else"
