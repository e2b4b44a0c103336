"""Progress of a phase: reports from long-running work, and the log lines made from them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Report = Callable[[float], None]  # receives the amount done so far


def ignore(done: float) -> None:
    """A Report that is discarded."""


def part_of(report: Report, start: float, share: float = 1.0) -> Report:
    """A Report for a part of `report` that begins at `start` and is scaled by `share`."""
    return lambda done: report(start + share * done)


@dataclass
class Progress:
    """The reported progress of a phase."""

    name: str
    total: int | None  # amount of work; None: unknown, and nothing is reported
    unit: str  # plural
    done: float = 0.0
    start: float = field(default_factory=lambda: time.monotonic())

    def line(self) -> str:
        """Done of total, with the rate and the remaining time once something is done."""
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
    """Inside the context, call `act` at this interval in a separate thread, because a single step may take longer."""
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
