"""What every environment, suite and rollout agrees on: text in, text out, one frozen record a step.

A `Suite` is a family of tasks (ScienceWorld, practice): it names its tasks by split, makes environments and
plays demonstrations. An `Environment` plays one episode at a time and belongs to one thread at a time. The
rollout, not the environment, ends an episode after `Suite.max_turns` actions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol

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
    """How hard the practice environment is (see practice.py)."""

    length: int = 32  # rooms to the vault: so many right turns before the reward
    spare_turns: int = 8  # wrong turns that the time allows
    signs: int = 10  # kinds of sign, 1 to 12; the later ones are the rarer
    temptation: float = 0.5  # share of rooms with a short cut
    demonstrator: str = "expert"  # expert | novice: knows the signs by day only


@dataclass
class EnvConfig:
    """The `env.*` part of the driver's configuration."""

    name: str = "scienceworld"  # scienceworld | alfworld | practice
    task_names: list[str] = field(default_factory=list)  # task types of train and iid; empty: the suite's default
    ood_task_names: list[str] = field(default_factory=list)  # held-out task types; empty: the suite's default
    max_turns: int | None = None  # actions an episode; null: the suite's default
    step_timeout: float = 30.0  # seconds an action may take before its environment is replaced
    start_timeout: float = 120.0  # seconds a reset may take, the start of a JVM included
    max_failures: int = 100  # episodes in a row lost to dead or hung environments that stop the run
    simplification: str = "easy"  # scienceworld: comma-separated, "" for none
    tick_limit: int = 100  # scienceworld: simulated moves that end an episode; 100 is the published limit
    progress_reward: float = 0.1  # scienceworld: share of the return that pays for partial score, 0..1
    admissible_commands: bool = True  # alfworld: prompts list what can be done now, as published
    jvm_memory: str = "256m"  # scienceworld: heap limit of each JVM (-Xmx)
    cache_dir: str | None = None  # demonstrations and authored games; null: $XDG_CACHE_HOME/epo_kernels
    practice: PracticeConfig = field(default_factory=PracticeConfig)


def clean_action(action: str | None) -> str:
    """Any model's output as one printable line of at most MAX_ACTION characters, harmless to send to an engine."""
    printable = (action or "").encode("utf-8", "ignore").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", printable).strip()[:MAX_ACTION]


def unknown_task_name(suite: str, name: str, known: Sequence[str]) -> str:
    """The complaint about a task type that a suite doesn't have."""
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{suite} has no task type {name!r}; it has: {', '.join(known)}{hint}"
