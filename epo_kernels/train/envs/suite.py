"""The base class of all suites, built-in and plug-in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, ClassVar

from epo_kernels.train.envs.base import Demonstration, EnvConfig, Environment, NoOptions, Task
from epo_kernels.train.envs.idle import IdleEnvironments


class Suite(ABC):
    """A family of tasks, named by `env.name`. Its methods may be called from any thread.

    Plug-ins derive from this class. They must define `tasks` and `make`, and should define `demonstrate`, because a
    model built from scratch is first cloned from demonstrations. Everything else has defaults.

    Args:
        config: the `env.*` settings; `config.options` is an instance of `Options`.

    Raises:
        ValueError: invalid options, named as the user writes them (env.options.size).
    """

    Options: ClassVar[type] = NoOptions  # the dataclass of env.options.* (see train/setting.py)
    panels: ClassVar[tuple[str, ...]] = ("iid",)  # splits that can be evaluated; the first is the default
    default_max_turns: ClassVar[int] = 30  # actions per episode, unless env.max_turns is set
    lists_actions: ClassVar[bool] = False  # whether `Observation.actions` is filled in
    requires: ClassVar[Mapping[str, str]] = {}  # {module that must be importable: pip requirement that provides it}

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.name = config.name
        self.max_turns = self.turn_limit(config)
        self._idle = IdleEnvironments(self.make)

    @classmethod
    def turn_limit(cls, config: EnvConfig) -> int:
        """Most actions of an episode: env.max_turns, or the default of the environment and its options."""
        return cls.default_max_turns if config.max_turns is None else config.max_turns

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """The tasks of "train" or a panel, always in the same order. Panels share no task with "train" or each other
        (one of them may be "train" itself).
        """

    @staticmethod
    def in_turns(columns: Sequence[Sequence[Task]]) -> list[Task]:
        """Tasks of several types, interleaved: the first n are always balanced."""
        return [task for row in zip_longest(*columns) for task in row if task is not None]

    @abstractmethod
    def make(self) -> Environment:
        """A new environment. It is used in one thread, while others run in theirs (see `ProcessEnvironment`)."""

    def demonstrate(self, task: Task) -> Demonstration:
        """An episode to imitate.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"{self.name} has no demonstrations; set model.warm_start.demonstrations=0")

    def borrow(self) -> AbstractContextManager[Any]:
        """An environment for exclusive use inside the `with`, for listing tasks and demonstrating. It is kept for the
        next caller.
        """
        return self._idle.borrow()

    def close(self) -> None:
        """Close the environments kept by `borrow`. The suite stays usable."""
        self._idle.close()
