"""Passes measured rounds to pytest-benchmark, with a timer that advances only by the measured times.

Rounds are interleaved over implementations and timed by the device, which a timer around one function cannot do;
tables, groups and JSON come from pytest-benchmark.
"""

from __future__ import annotations

_now = 0.0


def timer() -> float:
    """Seconds of the replayed clock."""
    return _now


def replay(benchmark, seconds: list[float]) -> None:
    """Report rounds with these times to the fixture; the test needs `@pytest.mark.benchmark(timer=replay.timer)`."""
    rounds = iter(seconds)

    def advance() -> None:
        global _now
        _now += next(rounds)

    benchmark.pedantic(advance, rounds=len(seconds), iterations=1)
