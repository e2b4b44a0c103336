import pytest

from epo_kernels.train.io import progress
from epo_kernels.train.io.progress import Progress, duration, part_of


def test_done_of_total_pace_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    phase = Progress("cloning", 40, "epochs")
    now[0] += 30
    assert phase.line() == "cloning: 0 of 40 epochs after 30 s"
    phase.done, now[0] = 2.5, 200.0
    assert phase.line() == "cloning: 2.5 of 40 epochs after 1 min 40 s, 40 s each, 25 min 0 s left"
    phase.done, now[0] = 30, 110.0
    assert phase.line() == "cloning: 30 of 40 epochs after 10 s, 3/s, 3 s left"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3599, "59 min 59 s")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_work_of_unknown_amount_tells_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    phase = Progress("saving step 10", None, "")
    now[0] = 61
    assert phase.line() == "saving step 10: 1 min 1 s so far"


def test_a_part_counts_on_from_what_was_done():
    heard = []
    part_of(heard.append, 10)(5)
    part_of(heard.append, 10, 0.5)(4)
    assert heard == [15, 12]
