"""Signals that stop a run: the first one asks it to stop where its state is whole, a later one ends it at once."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

# Asked to end, Ctrl-C, the terminal or connection lost, and SLURM's warning before its time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Seconds during which further signals belong to the first: `timeout` sends two, a closed terminal two SIGHUPs.
SAME_REQUEST = 1.0


class Stopped(Exception):
    """The run was asked to stop, by the signal given."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class StopRequest:
    """Listens to SIGNALS within a `with`; `check` raises Stopped after the first of them.

    A signal that comes more than a second after the first ends the process at once. Signals reach the main thread
    alone: in another thread it listens to nothing.
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
                # Not through the display: the signal may have come while it was printing.
                os.write(2, b"stopping as soon as everything is whole; once more: at once\n")
        elif time.monotonic() - self._since > SAME_REQUEST:
            if number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_nohup(number: signal.Signals) -> bool:
    """Whether the process was started to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
