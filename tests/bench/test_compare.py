"""Changes beyond the noise are reported, changes within it are not."""

import pytest

from bench import compare, records
from tests.bench.test_records import MACHINE, record


def verdict_of(was, now):
    (change,) = compare.compare([was], [now])
    return change.verdict


def test_far_apart_is_a_change():
    assert verdict_of(record(median=1.0), record(median=1.2)) == "slower"
    assert verdict_of(record(median=1.2), record(median=1.0)) == "faster"


def test_overlapping_quartiles_are_noise():
    was = record(median=1.0, spread_ms=[0.9, 1.3])
    assert verdict_of(was, record(median=1.25, spread_ms=[1.2, 1.4])) == "same"
    assert verdict_of(was, record(median=1.35, spread_ms=[1.31, 1.4])) == "slower"


def test_a_small_difference_of_quiet_runs_is_noise():
    was = record(median=1.0, spread_ms=[0.999, 1.001])
    assert verdict_of(was, record(median=1.02, spread_ms=[1.019, 1.021])) == "same"
    assert verdict_of(was, record(median=1.04, spread_ms=[1.039, 1.041])) == "slower"


def test_a_gate_that_changed_is_named():
    failing = record(median=None, gate="fails: wrong")
    assert verdict_of(record(), failing) == "fails: wrong"
    assert verdict_of(failing, record()) == "passes now"


def test_new_and_gone():
    changes = compare.compare([record("a")], [record("b")])
    assert {change.case: change.verdict for change in changes} == {"a": "gone", "b": "new"}


@pytest.mark.parametrize(
    ("impl", "median", "code"), [("ours:cuda", 2.0, 1), ("eager", 2.0, 0), ("ours:cuda", 1.0, 0), ("ours:cuda", 0.5, 0)]
)
def test_exit_code_says_whether_this_library_lost_something(tmp_path, capsys, impl, median, code):
    for folder, value in (("old", 1.0), ("new", median)):
        records.write(tmp_path / folder / "results.json", MACHINE, [record(impl=impl, median=value)])
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == code
    shown = capsys.readouterr().out
    assert ("+100.0%" in shown) == (median == 2.0)
    assert ("1 of 1 figures are the same" in shown) == (median == 1.0)
