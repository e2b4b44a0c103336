"""SIGTERM and Ctrl-C: the first asks the run to stop where its state is whole, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_AT_ONCE: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class Stopped(Exception):
    """The run was asked to stop, by the signal given."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class StopRequest:
    """Listens to SIGTERM and SIGINT within a `with`; `check` raises Stopped after the first of them.

    Signals reach the main thread alone: in another thread it listens to nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        if self._received is not None:
            raise Stopped(self._received)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._take) for number in _AT_ONCE}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._received = number
        for other, handler in _AT_ONCE.items():
            signal.signal(other, handler)
        # Not through the display: the signal may have come while it was printing.
        os.write(2, b"stopping as soon as everything is whole; once more: at once\n")
