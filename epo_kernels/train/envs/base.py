"""The interface shared by environments, suites and rollout: text in, text out, one frozen record per step."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from epo_kernels.train.setting import POSITIVE, at_least, require, setting, suggest

SPLITS = ("train", "iid", "ood")  # of the built-in suites
MAX_ACTION = 200  # characters; the longest gold action has about 90 (ScienceWorld)


class EnvironmentFailure(RuntimeError):
    """An environment died, hung or could not start. The message gives the reason and the fix."""


@dataclass(frozen=True)
class Task:
    """The start of one episode. The members of a GRPO group share it."""

    name: str  # the task type, e.g. "find-non-living-thing"
    variation: int
    seed: int = 0  # only for environments with their own randomness


@dataclass(frozen=True)
class Observation:
    """What the policy sees before it acts."""

    goal: str  # the task: the sentence that must never be cut from a prompt
    text: str  # the answer to the last action; after reset, the opening text
    scene: str = ""  # what is visible now; "" if `text` includes it
    state: str = ""  # GiGPO compares turns with the same state; "": the scene, or the text if there is no scene
    actions: tuple[str, ...] = ()  # admissible actions, if the environment lists them and `scene` does not


@dataclass(frozen=True)
class StepResult:
    """The outcome of one action."""

    observation: Observation
    reward: float  # the RL reward of this step, by the suite's documented rule; sums to the return
    done: bool
    score: float  # 0..100
    success: bool  # the task is completed
    valid: bool = True  # the environment understood the action

    @property
    def official_success(self) -> bool:
        """Success as defined by the published EPO code."""
        return self.done and self.score > 0


@dataclass(frozen=True)
class Demonstration:
    """A demonstrated episode, used for cloning and to train the tokenizer.

    `observations[i]` is what was seen before `actions[i]`; `score` is the final score, 0..100.
    """

    task: Task
    observations: list[Observation]
    actions: list[str]
    score: float


class Environment(Protocol):
    """Plays one episode at a time. Not thread-safe: use from one thread at a time.

    Every method may raise EnvironmentFailure; the driver then closes this environment and creates a new one.
    """

    def reset(self, task: Task) -> Observation: ...

    def step(self, action: str) -> StepResult: ...

    def close(self) -> None:
        """Release all resources (default: none). May be called twice, and from another thread while a call hangs."""


@dataclass
class NoOptions:
    """For a suite without settings of its own."""


@dataclass
class EnvConfig:
    """The environment and its limits; each environment has its own settings in env.options."""

    name: str = setting("scienceworld", "scienceworld | alfworld | practice | a plug-in, as my_module:MySuite")
    max_turns: int | None = setting(None, "actions per episode; null: the environment's default", at_least(1))
    step_timeout: float = setting(
        30.0, "seconds per action before its environment is replaced", POSITIVE, resume="free"
    )
    start_timeout: float = setting(
        120.0, "seconds per reset, including the start of a process", POSITIVE, resume="free"
    )
    max_failures: int = setting(
        100, "consecutive episodes lost to failed environments that stop the run", at_least(1), resume="free"
    )
    cache_dir: str | None = setting(
        None, "folder of demonstrations and generated games; null: $XDG_CACHE_HOME/epo_kernels", resume="free"
    )
    options: Any = setting(None, "the environment's own settings: an instance of its suite's Options")


def clean_action(action: str | None) -> str:
    """Model output as one printable line of at most MAX_ACTION characters, safe to send to an engine."""
    printable = (action or "").encode("utf-8", "ignore").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", printable).strip()[:MAX_ACTION]


def unknown_task_name(suite: str, name: str, known: Sequence[str]) -> str:
    """The error for a task type that a suite does not have."""
    return f"{suite} has no task type {name!r}; it has: {', '.join(known)}{suggest(name, known)}"


def check_task_names(names: Sequence[str], held_out: Sequence[str]) -> None:
    """Raise ConfigError unless there are task types to train on and none of them is held out."""
    require(bool(names), "env.options.task_names must name at least one task type")
    both = sorted(set(names) & set(held_out))
    require(
        not both, f"env.options.ood_task_names must be held out of env.options.task_names; both name {', '.join(both)}"
    )
