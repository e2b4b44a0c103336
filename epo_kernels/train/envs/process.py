"""Environments in separate processes: for simulators that are not thread-safe, leak memory or hang."""

import importlib
from dataclasses import asdict
from typing import Any

from epo_kernels.train.envs.base import EnvConfig, Environment, Observation, StepResult, Task
from epo_kernels.train.envs.demonstrations import observation_of
from epo_kernels.train.envs.workers import Worker


class ProcessEnvironment(Environment):
    """An environment of class `kind` in its own process. Not thread-safe: use from one thread at a time.

    The process imports the module of `kind` and `epo_kernels.train.envs`, but not PyTorch, so that it starts in a
    fraction of a second. In it, the package `epo_kernels` itself is empty: import from its submodules.

    Args:
        kind: a class at the top level of its module.
        config: its timeouts apply to each call.
        arguments: arguments of the class's constructor; JSON values.

    Raises:
        EnvironmentFailure: the process or the environment did not start.
    """

    def __init__(self, kind: type[Environment], config: EnvConfig, **arguments: Any) -> None:
        self._config = config
        self._worker = Worker(
            f"{__name__}:_Served",
            f"a {kind.__name__}",
            config.start_timeout,
            module=kind.__module__,
            kind=kind.__name__,
            arguments=arguments,
        )

    @property
    def process_id(self) -> int:
        return self._worker.process.pid

    def reset(self, task: Task) -> Observation:
        return observation_of(self.call("reset", task=asdict(task)))

    def step(self, action: str) -> StepResult:
        result = self._worker.call("step", self._config.step_timeout, action=action)
        return StepResult(**result | {"observation": observation_of(result["observation"])})

    def call(self, method: str, **arguments: Any) -> Any:
        """Call another method of `kind`. Arguments and result are JSON values."""
        return self._worker.call(method, self._config.start_timeout, "env.start_timeout", **arguments)

    def close(self) -> None:
        self._worker.close()


class _Served:
    """The server side: the environment, with its records as JSON values."""

    def __init__(self, module: str, kind: str, arguments: dict[str, Any]) -> None:
        self._environment = getattr(importlib.import_module(module), kind)(**arguments)

    def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        return asdict(self._environment.reset(Task(**task)))

    def step(self, action: str) -> dict[str, Any]:
        return asdict(self._environment.step(action))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)
