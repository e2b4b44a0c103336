"""The suite: one test per case and implementation. Select with `-k`: `make bench ARGS="-k 'linear-loss and ours'"`."""

import pytest

from bench import gate, replay


@pytest.mark.benchmark(timer=replay.timer)
def test_case(case, implementation, session, benchmark):
    benchmark.group = case.name
    record, laps = session.measured(case, implementation.name)
    if record.gate.startswith("not run"):
        pytest.skip(record.gate)
    if record.gate != gate.PASS:
        # Faults of other libraries are shown, but do not fail this suite.
        (pytest.fail if implementation.ours else pytest.xfail)(record.gate)
    benchmark.extra_info.update(vars(record))
    replay.replay(benchmark, [lap.seconds for lap in laps])
