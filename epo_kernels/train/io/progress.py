"""How far a phase is: what long work reports, and the lines that a log gets of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Report = Callable[[float], None]  # gets the amount done so far


def ignore(done: float) -> None:
    """A Report that nobody reads."""


def part_of(report: Report, start: float, share: float = 1.0) -> Report:
    """Reports to `report` as a part that begins after `start` and counts by `share`."""
    return lambda done: report(start + share * done)


@dataclass
class Progress:
    """What was reported of a phase."""

    name: str
    total: int | None  # amount of work; None: not known, and nothing is reported
    unit: str  # in the plural
    done: float = 0.0
    start: float = field(default_factory=lambda: time.monotonic())

    def line(self) -> str:
        """Done of total, and as soon as something is done the pace and the time left."""
        spent = time.monotonic() - self.start
        if self.total is None:
            return f"{self.name}: {duration(spent)} so far"
        head = f"{self.name}: {self.done:.4g} of {self.total} {self.unit} after {duration(spent)}"
        if not self.done:
            return head
        rate = self.done / spent
        pace = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return f"{head}, {pace}, {duration(max(self.total - self.done, 0) / rate)} left"


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Inside, call `act` at this interval, in a thread of its own: a single piece of work may take longer."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
