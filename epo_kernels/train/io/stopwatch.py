"""Time spent in the named parts of the learner's work, without synchronising the GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of each part: by clock on the CPU, by pairs of stream events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._events.append((name, began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds by part. On a GPU this waits for the last event, so call it when the work is done."""
        for name, began, ended in self._events:
            ended.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + began.elapsed_time(ended) / 1e3
        self._events = []
        return dict(self._seconds)
