"""The phases of a training step, each timed and shown as a bar."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from epo_kernels.train.io.display import Display
from epo_kernels.train.io.progress import Report

BARS = {
    "old_log_prob": "old log-probs",
    "values": "values",
    "update_critic": "critic's update",
    "update_actor": "update",
}


@dataclass
class Phases:
    """Seconds spent in each phase of a step."""

    display: Display
    step: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def __call__(self, name: str, samples: int) -> Iterator[Report]:
        """Time one of `BARS`, which is never interrupted; yields a Report of the number of samples done."""
        with self.timed(name), self.display.bar(f"step {self.step}, {BARS[name]}", samples, "samples") as report:
            yield report

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{name}": spent for name, spent in self.seconds.items()}
