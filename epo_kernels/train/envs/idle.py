"""Environments that a suite reuses, because starting one takes seconds."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from epo_kernels.train.envs.base import Environment, EnvironmentFailure

E = TypeVar("E", bound=Environment)


class IdleEnvironments(Generic[E]):
    """Lends environments, each to one thread at a time, and creates another if none is idle."""

    def __init__(self, make: Callable[[], E]) -> None:
        self._make = make
        self._idle: list[E] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[E]:
        """An environment for exclusive use. It is returned after any exception except an environment failure."""
        with self._lock:
            environment = self._idle.pop() if self._idle else None
        environment = environment or self._make()
        try:
            yield environment
        except EnvironmentFailure:
            environment.close()
            environment = None
            raise
        finally:
            if environment is not None:
                with self._lock:
                    self._idle.append(environment)

    def close(self) -> None:
        """Close the idle environments. Further calls of `borrow` still work."""
        with self._lock:
            idle, self._idle = self._idle, []
        for environment in idle:
            environment.close()
