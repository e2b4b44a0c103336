"""What every environment, suite and rollout agrees on: text in, text out, one frozen record a step.

A `Suite` is a family of tasks (ScienceWorld, practice): it names its tasks by split, makes environments and
plays demonstrations. An `Environment` plays one episode at a time and belongs to one thread at a time. The
rollout, not the environment, ends an episode after `Suite.max_turns` actions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from epo_kernels.train.setting import POSITIVE, at_least, group, one_of, setting

SPLITS = ("train", "iid", "ood")
MAX_ACTION = 200  # characters; the longest gold action has about 90 (ScienceWorld)


class EnvironmentFailure(RuntimeError):
    """An environment died, hung or could not start. The message says what happened and how to cure it."""


@dataclass(frozen=True)
class Task:
    """The start of one episode. The members of a GRPO group share it."""

    name: str  # the task type, e.g. "find-non-living-thing"
    variation: int
    seed: int = 0  # only for environments that have randomness of their own


@dataclass(frozen=True)
class Observation:
    """What the policy sees before it acts."""

    goal: str  # the task: the sentence that must never be cut from a prompt
    text: str  # the answer to the last action; at reset, the opening text
    scene: str = ""  # what can be seen now; "" where `text` says all
    state: str = ""  # GiGPO compares turns of which this is the same; "": those of the same scene, or text without one
    actions: tuple[str, ...] = ()  # all that can be done now, where the environment knows and `scene` doesn't say


@dataclass(frozen=True)
class StepResult:
    """What one action brought about."""

    observation: Observation
    reward: float  # what RL gets for this step, by the suite's documented rule; sums to the return
    done: bool
    score: float  # 0..100
    success: bool  # truly completed
    official_success: bool  # the published code's "done and score > 0"
    valid: bool  # the environment understood the action


@dataclass(frozen=True)
class Demonstration:
    """A shown episode, for cloning and for the tokenizer's text.

    `observations[i]` is what was seen before `actions[i]`; `score` is the final one, 0..100.
    """

    task: Task
    observations: list[Observation]
    actions: list[str]
    score: float


class Environment(Protocol):
    """One episode at a time. Every method may raise EnvironmentFailure; after that only `close` is of use."""

    def reset(self, task: Task) -> Observation: ...

    def step(self, action: str) -> StepResult: ...

    def close(self) -> None:
        """Give everything back. Safe to call twice, and from another thread while a call hangs."""
        ...


class Suite(Protocol):
    """A family of tasks. Its methods may be called from any thread."""

    name: str
    max_turns: int

    def tasks(self, split: str) -> list[Task]:
        """The tasks of "train", "iid" or "ood": fixed order, disjoint."""
        ...

    def make(self) -> Environment: ...

    def demonstrate(self, task: Task) -> Demonstration: ...

    def close(self) -> None: ...


@dataclass
class PracticeConfig:
    """Difficulty of the practice environment (see practice.py)."""

    length: int = setting(32, "rooms to the vault, each with one correct turn")
    spare_turns: int = setting(8, "wrong turns that the time limit allows")
    signs: int = setting(10, "kinds of signs, 1 to 12; later ones are rarer")
    temptation: float = setting(0.5, "share of rooms with a shortcut")
    demonstrator: str = setting("expert", "expert | novice: knows the signs only by day")


@dataclass
class EnvConfig:
    """The environment: its tasks, limits and processes."""

    name: str = setting("scienceworld", "environment", one_of("scienceworld", "alfworld", "practice"))
    task_names: list[str] = setting([], "task types of train and iid; []: the environment's default")
    ood_task_names: list[str] = setting([], "held-out task types of ood; []: the environment's default")
    max_turns: int | None = setting(None, "actions per episode; null: the environment's default", at_least(1))
    step_timeout: float = setting(
        30.0, "seconds per action before its environment is replaced", POSITIVE, resume="free"
    )
    start_timeout: float = setting(120.0, "seconds per reset, including the start of a JVM", POSITIVE, resume="free")
    max_failures: int = setting(
        100, "consecutive episodes lost to failed environments that stop the run", at_least(1), resume="free"
    )
    simplification: str = setting("easy", 'scienceworld: comma-separated simplifications; "": none')
    tick_limit: int = setting(100, "scienceworld: simulated moves per episode; the published limit is 100")
    progress_reward: float = setting(0.1, "scienceworld: share of the return that rewards partial score, 0 to 1")
    admissible_commands: bool = setting(True, "alfworld: list the admissible commands in the prompt, as published")
    jvm_memory: str = setting("256m", "scienceworld: heap limit of each JVM (-Xmx)", resume="free")
    cache_dir: str | None = setting(
        None, "folder of demonstrations and authored games; null: $XDG_CACHE_HOME/epo_kernels", resume="free"
    )
    practice: PracticeConfig = group(PracticeConfig)


def clean_action(action: str | None) -> str:
    """Any model's output as one printable line of at most MAX_ACTION characters, harmless to send to an engine."""
    printable = (action or "").encode("utf-8", "ignore").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", printable).strip()[:MAX_ACTION]


def unknown_task_name(suite: str, name: str, known: Sequence[str]) -> str:
    """The complaint about a task type that a suite doesn't have."""
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{suite} has no task type {name!r}; it has: {', '.join(known)}{hint}"
