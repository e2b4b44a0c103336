"""Runs many blocking environments concurrently, one thread each; one that dies or hangs does not affect the others.

A slot holds one environment. `reset` and `step` return futures immediately, so a caller can wait for all of them, for
any of them, or do something else meanwhile. A future always completes, with EnvironmentFailure if the environment
raised or timed out. The environment of a failed slot is closed, and its next `reset` creates a new one.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from epo_kernels.train.envs.base import Environment, EnvironmentFailure, Observation, StepResult, Task
from epo_kernels.train.envs.suite import Suite


@dataclass(frozen=True)
class _Job:
    call: Callable[[Environment], Any]
    limit: float  # seconds after it starts
    hint: str  # the setting to raise if it was only slow
    future: Future[Any] = field(default_factory=Future)


class _Worker:
    """One environment and its thread, created with its first job. Once it fails it stays failed."""

    def __init__(self, make: Callable[[], Environment], name: str) -> None:
        self._make = make
        self._environment: Environment | None = None
        self._lock = threading.Lock()  # guards the attributes below
        self._unfinished: deque[_Job] = deque()
        self._deadline = math.inf
        self.broken = False
        self.failure: EnvironmentFailure | None = None  # the reason it failed
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, job: _Job) -> None:
        with self._lock:
            if not self.broken:
                job.future.set_running_or_notify_cancel()  # can no longer be cancelled
                self._unfinished.append(job)
                self._queue.put(job)
                return
        job.future.set_exception(EnvironmentFailure("the environment of this slot has failed; reset the slot"))

    def expire(self) -> None:
        """Abandon the environment if its job is late."""
        with self._lock:
            is_late = not self.broken and time.monotonic() > self._deadline
            late = self._unfinished[0] if is_late else None
        if late:
            self.abandon(
                EnvironmentFailure(
                    f"an environment did not answer within {late.limit:g} s and is replaced; "
                    f"if it was only slow, raise {late.hint} or lower rollout.environments"
                )
            )

    def abandon(self, failure: EnvironmentFailure) -> threading.Thread | None:
        """Fail all unfinished jobs and close the environment; returns the thread that closes it, if any."""
        with self._lock:
            if self.broken:
                return None
            self.broken = True
            self.failure = failure
            unfinished, self._unfinished = self._unfinished, deque()
            environment = self._environment
        self._queue.put(None)
        for job in unfinished:
            job.future.set_exception(failure)
        if environment is None:  # not created yet, or being created: then its own thread closes it
            return None
        ending = threading.Thread(target=environment.close, daemon=True)  # closing may hang too
        ending.start()
        return ending

    def _run(self) -> None:
        while job := self._queue.get():
            with self._lock:
                self._deadline = time.monotonic() + job.limit
            try:
                result = job.call(self._environment or self._begin())
            except Exception as error:  # of any kind: reported as a failure of this episode
                self.abandon(_as_failure(error))
                break
            with self._lock:
                self._deadline = math.inf
                if self.broken:
                    break
                self._unfinished.popleft()
            job.future.set_result(result)
        if self._environment is not None:
            self._environment.close()

    def _begin(self) -> Environment:
        environment = self._make()
        with self._lock:
            self._environment = environment
            if self.broken:
                raise EnvironmentFailure("the environment was abandoned before it started")
        return environment


def _as_failure(error: Exception) -> EnvironmentFailure:
    if isinstance(error, EnvironmentFailure):
        return error
    failure = EnvironmentFailure(f"an environment raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@dataclass
class EnvironmentPool:
    """`size` slots over the environments of `suite`, which are created when first needed.

    Close it, or use it as a context manager: environments may be processes.
    """

    suite: Suite
    size: int
    step_timeout: float = 30.0  # seconds per step
    start_timeout: float = 120.0  # seconds per reset, including the creation of the environment
    max_failures: int = 100  # consecutive lost episodes before `reset` raises
    replaced: int = field(default=0, init=False)  # number of environments that failed and were replaced

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 slot, got {self.size}")
        self._failures = 0  # consecutive
        self._acted = [False] * self.size  # since the slot's last reset
        self._workers = [self._worker(slot) for slot in range(self.size)]
        self._prefetched: dict[int, tuple[Task, Future[Observation]]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="environment-watchdog", daemon=True).start()

    def reset(self, slot: int, task: Task) -> Future[Observation]:
        """Start an episode in `slot`; if this reset was prefetched, returns its future.

        Raises:
            EnvironmentFailure: too many consecutive episodes were lost; includes the reason of the last.
        """
        prefetched, future = self._prefetched.pop(slot, (None, None))
        if future is not None and prefetched == task:
            return future
        if self._workers[slot].broken:
            self._replace(slot)
        elif self._acted[slot]:  # its last episode was played
            self._failures = 0
        self._acted[slot] = False
        return self._submit(slot, lambda e: e.reset(task), self.start_timeout, "env.start_timeout")

    def step(self, slot: int, action: str) -> Future[StepResult]:
        """Play an action in `slot`."""
        self._prefetched.pop(slot, None)
        self._acted[slot] = True
        return self._submit(slot, lambda e: e.step(action), self.step_timeout, "env.step_timeout")

    def prefetch(self, tasks: Sequence[Task]) -> None:
        """Start to reset slots 0, 1, ... to `tasks` in the background, so that the next `reset` finds them ready.

        Ends any episode in these slots.
        """
        for slot, task in enumerate(tasks):
            self._prefetched[slot] = (task, self.reset(slot, task))

    def close(self) -> None:
        """Close all environments. Unfinished jobs fail."""
        self._closed.set()
        failure = EnvironmentFailure("the pool was closed")
        endings = [worker.abandon(failure) for worker in self._workers]
        for ending in endings:
            if ending is not None:
                ending.join(timeout=self.step_timeout)

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _replace(self, slot: int) -> None:
        failure = self._workers[slot].failure
        self.replaced += 1
        self._failures += 1
        self._workers[slot] = self._worker(slot)
        if self._failures >= self.max_failures:
            raise EnvironmentFailure(
                f"{self._failures} consecutive episodes were lost to their environments (env.max_failures); "
                f"the last: {failure}"
            ) from failure

    def _worker(self, slot: int) -> _Worker:
        return _Worker(self.suite.make, f"environment-{slot}")

    def _submit(self, slot: int, call: Callable[[Environment], Any], limit: float, hint: str) -> Future[Any]:
        if self._closed.is_set():
            raise RuntimeError("the pool is closed")
        job = _Job(call, limit, hint)
        self._workers[slot].submit(job)
        return job.future

    def _watch(self) -> None:
        pause = min(self.step_timeout, self.start_timeout, 2.0) / 10
        while not self._closed.wait(pause):
            for worker in self._workers:
                worker.expire()
