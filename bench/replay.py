"""Hands measured rounds to pytest-benchmark: its timer is a clock that stands still but for what was measured.

Rounds are interleaved over implementations and timed by the device, which a timer around one function can't do; tables,
groups and JSON are pytest-benchmark's own.
"""

from __future__ import annotations

_now = 0.0


def timer() -> float:
    """Seconds of the replayed clock."""
    return _now


def replay(benchmark, seconds: list[float]) -> None:
    """Let the fixture see rounds that took so long; the test needs `@pytest.mark.benchmark(timer=replay.timer)`."""
    rounds = iter(seconds)

    def advance() -> None:
        global _now
        _now += next(rounds)

    benchmark.pedantic(advance, rounds=len(seconds), iterations=1)
