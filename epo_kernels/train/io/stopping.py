"""Signals that stop a run: the first one requests a stop in a consistent state, a later one ends it immediately."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

# Termination, Ctrl-C, a lost terminal or connection, and SLURM's warning before its time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which further signals count as the first: `timeout` sends two, a closed terminal two SIGHUPs.
SAME_REQUEST = 1.0


class Stopped(Exception):
    """The run was asked to stop by the given signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class StopRequest:
    """Listens to SIGNALS within a `with`; `check` raises Stopped after the first of them.

    A signal more than a second after the first ends the process immediately. Python delivers signals to the main thread
    only: in another thread this listens to nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._since = 0.0
        self._former: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        if self._received is not None:
            raise Stopped(self._received)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._take) for number in SIGNALS if not _is_nohup(number)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._since = number, time.monotonic()
            with suppress(OSError):  # the terminal may be gone
                # Not through the display, because the signal may have interrupted its printing.
                os.write(2, b"stopping at the next consistent state; send the signal again to stop immediately\n")
        elif time.monotonic() - self._since > SAME_REQUEST:
            if number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_nohup(number: signal.Signals) -> bool:
    """Whether the process was started to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
