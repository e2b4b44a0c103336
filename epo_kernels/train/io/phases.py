"""The phases of a training step: each is timed, and shows a bar."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from epo_kernels.train.io.display import Display
from epo_kernels.train.io.progress import Report

BARS = {
    "old_log_prob": "old log-probs",
    "values": "values",
    "update_critic": "critic's update",
    "update_actor": "update",
}


class Phases:
    """
    Args:
        display: where bars show.
        step: the training step.

    Attributes:
        seconds: spent in each phase.
    """

    def __init__(self, display: Display, step: int) -> None:
        self.seconds: dict[str, float] = {}
        self._display = display
        self._step = step

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def __call__(self, name: str, samples: int) -> Iterator[Report]:
        """Time one of `BARS`, which is never stopped half done; gives a Report of the number of samples done."""
        with self.timed(name), self._display.bar(f"step {self._step}, {BARS[name]}", samples, "samples") as report:
            yield report

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{name}": spent for name, spent in self.seconds.items()}
