"""Whole training steps by phases, with eager PyTorch and with this library."""

import pytest

from bench import replay, step


@pytest.fixture(scope="session")
def steps():
    return {}


@pytest.mark.parametrize("backend", step.BACKENDS)
@pytest.mark.benchmark(timer=replay.timer)
def test_step(step_case, backend, steps, session, benchmark):
    benchmark.group = step_case.name
    if step_case not in steps:
        session.expect(step_case.name)
        try:
            steps[step_case] = step.measure_step(step_case, session.device)
        except ImportError as error:
            pytest.skip(f"not run: {error}; the driver needs the packages of the extra `train`")
        session.add(step.records_of(step_case, steps[step_case]))
    replay.replay(benchmark, [sum(played.seconds.values()) for played in steps[step_case][backend]])
