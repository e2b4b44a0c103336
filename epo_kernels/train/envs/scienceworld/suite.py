"""ScienceWorld (Wang et al. 2022), the real simulator: 30 types of science task in a text house.

Success is a score of 100. The published EPO code counts "done and score > 0" instead, which waiting alone often
earns; it is reported beside, as `official_success`.

What RL gets, with w = `env.progress_reward`: w·(gain of the best score so far)/100 a step, and 1 − w on success.
So a return lies in 0..1 and no partial score outweighs a completion. The best score never falls, so a wrong focus
(which ends the episode) costs nothing that idling would have kept; and waiting earns no progress.
"""

import re
from collections.abc import Callable
from itertools import zip_longest

from epo_kernels.train.envs.base import (
    SPLITS,
    Demonstration,
    EnvConfig,
    Observation,
    StepResult,
    Task,
    clean_action,
    unknown_task_name,
)
from epo_kernels.train.envs.demonstrations import cache_folder, play, read_demonstration, write_demonstration
from epo_kernels.train.envs.idle import IdleEnvironments
from epo_kernels.train.envs.scienceworld.text import (
    LOOKED,
    clean_answer,
    clean_goal,
    clean_scene,
    is_understood,
)

try:
    from scienceworld.constants import ID2TASK
    from scienceworld.version import __version__ as VERSION

    from epo_kernels.train.envs.scienceworld.jvm import Simulator
except ImportError as error:
    raise ImportError(
        "env.name=scienceworld needs the package scienceworld: pip install 'epo-kernels[scienceworld]'"
    ) from error

TASK_NAMES: tuple[str, ...] = tuple(sorted(ID2TASK.values()))
SIMPLIFICATIONS = (
    "easy",
    "noElectricalAction",
    "openContainers",
    "openDoors",
    "selfWateringFlowerPots",
    "teleportAction",
)
DEFAULT_TASK_NAMES = ("find-non-living-thing",)
DEFAULT_MAX_TURNS = 30  # the paper's
DEMONSTRATION_FORMAT = 1  # raise it when observations change: cached demonstrations show them as they were


class ScienceWorldEnvironment:
    """One simulator in a JVM of its own, started at once. Belongs to one thread at a time."""

    def __init__(self, config: EnvConfig) -> None:
        self._simplification = config.simplification
        self._tick_limit = config.tick_limit
        self._progress_reward = config.progress_reward
        self._simulator = Simulator(config.jvm_memory, config.step_timeout, config.start_timeout)
        self._done = True

    @property
    def process_id(self) -> int:
        return self._simulator.process.pid

    def variations(self, name: str) -> tuple[list[int], list[int]]:
        """The seen (train) and unseen (dev, then test) variations of a task type."""
        self._load(name, 0)
        lists = [list(self._simulator.call(f"getVariations{part}")) for part in ("Train", "Dev", "Test")]
        return lists[0], lists[1] + lists[2]

    def gold_actions(self, task: Task) -> list[str]:
        """A gold path as the simulator finds it: another one at each call."""
        self._load(task.name, task.variation, with_gold=True)
        return list(self._simulator.call("getGoldActionSequence"))

    def reset(self, task: Task) -> Observation:
        """Load the task (about 90 ms; the simulator's own reset takes thrice that).

        Raises:
            ValueError: no such task type or variation.
            EnvironmentFailure: the JVM died or hung.
        """
        if task.name not in TASK_NAMES:
            raise ValueError(unknown_task_name("ScienceWorld", task.name, TASK_NAMES))
        count = self._simulator.call("getTaskMaxVariations", task.name)
        if not 0 <= task.variation < count:
            raise ValueError(f"{task.name} has variations 0 to {count - 1}, not {task.variation}")
        self._load(task.name, task.variation)
        self._goal = clean_goal(self._simulator.call("getTaskDescription"))
        self._best_score = 0
        self._done = False
        return Observation(self._goal, LOOKED, self._scene())

    def step(self, action: str | None) -> StepResult:
        """Play one action; text of any kind is safe.

        Raises:
            RuntimeError: the episode is over.
            EnvironmentFailure: the JVM died or hung.
        """
        if self._done:
            raise RuntimeError("the episode is over (or never began): reset the environment first")
        action = clean_action(action)
        answer = self._simulator.call("step", action)
        raw_score = round(100 * self._simulator.call("getScore"))
        score = min(max(raw_score, 0), 100)
        success = score == 100
        # A wrong focus leaves a score of -1 that sticks, often without being called completed.
        self._done = (
            raw_score < 0
            or success
            or bool(self._simulator.call("getCompleted"))
            or self._simulator.call("getNumMoves") > self._tick_limit
        )
        scene = self._scene()
        is_look = answer.startswith("This ") and clean_scene(answer, "") == clean_scene(self._look, "")
        return StepResult(
            observation=Observation(self._goal, LOOKED if is_look else clean_answer(answer), scene),
            reward=self._reward(action, score),
            done=self._done,
            score=float(score),
            success=success,
            official_success=self._done and score > 0,
            valid=is_understood(answer),
        )

    def close(self) -> None:
        self._simulator.close()

    def _load(self, name: str, variation: int, with_gold: bool = False) -> None:
        self._done = True
        self._simulator.call("load", name, variation, self._simplification, with_gold)

    def _scene(self) -> str:
        self._look = self._simulator.call("freeActionLook")
        return clean_scene(self._look, self._simulator.call("freeActionInventory"))

    def _reward(self, action: str, score: int) -> float:
        gain = max(score - self._best_score, 0) / 100
        self._best_score = max(score, self._best_score)
        progress = 0.0 if action.lower().startswith("wait") else self._progress_reward * gain
        return progress + (1 - self._progress_reward) * (score == 100)


def _is_needless(action: str, answer: str) -> bool:
    return action == "look around" or answer.endswith("is already open.")


# What to leave out of a gold path, the most first: some tasks need their waits.
_CLEANINGS: tuple[Callable[[str, str], bool], ...] = (
    lambda action, answer: _is_needless(action, answer) or action.startswith("wait"),
    _is_needless,
)


def _demonstrate(environment: ScienceWorldEnvironment, task: Task) -> Demonstration:
    """Play a gold path for real, without its idle moves where it still scores 100.

    Raises:
        ValueError: no gold path scores 100 within the limit of ticks.
    """
    environment.reset(task)  # refuses a variation that doesn't exist
    gold, answers = play(environment, task, environment.gold_actions(task))
    if gold.score == 100:
        for is_idle in _CLEANINGS:
            kept = [a for a, answer in zip(gold.actions, answers, strict=True) if not is_idle(a, answer)]
            demonstration, _ = play(environment, task, kept)
            if demonstration.score == 100:
                return demonstration
        return gold
    raise ValueError(
        f"the gold path of {task.name}, variation {task.variation}, scores {gold.score:g} and not 100 after "
        f"{len(gold.actions)} actions; if it is only too long, raise env.tick_limit"
    )


def _check(config: EnvConfig) -> None:
    for name in [*config.task_names, *config.ood_task_names]:
        if name not in TASK_NAMES:
            raise ValueError(
                f"env.task_names, env.ood_task_names: {unknown_task_name('ScienceWorld', name, TASK_NAMES)}"
            )
    if both := set(config.task_names or DEFAULT_TASK_NAMES) & set(config.ood_task_names):
        raise ValueError(f"env.ood_task_names must be held out of env.task_names; both name {sorted(both)}")
    used = [part for part in config.simplification.split(",") if part]
    if unknown := [part for part in used if part not in SIMPLIFICATIONS]:
        raise ValueError(f"env.simplification: {unknown} is none of {', '.join(SIMPLIFICATIONS)}")
    for name in [*config.task_names, *config.ood_task_names]:
        if "noElectricalAction" in used and ("power-component" in name or "conductivity" in name):
            raise ValueError(f"env.simplification noElectricalAction makes {name} impossible; leave one out")
    if not 0 <= config.progress_reward < 1:
        raise ValueError(f"env.progress_reward must be in [0, 1), not {config.progress_reward}")
    if config.tick_limit < 1:
        raise ValueError(f"env.tick_limit must be at least 1, not {config.tick_limit}")
    if not re.fullmatch(r"\d+[kmgKMG]", config.jvm_memory):
        raise ValueError(f"env.jvm_memory must be a size such as 256m or 1g, not {config.jvm_memory!r}")


class ScienceWorldSuite:
    """ScienceWorld's tasks.

    "train" holds the training variations of `env.task_names`, "iid" their unseen ones (dev, then test), "ood" the
    unseen ones of `env.ood_task_names`. Task types take turns, so any first n tasks are a balanced panel.

    Raises:
        ValueError: an unknown task type or simplification, or a setting out of range.
    """

    name = "scienceworld"

    def __init__(self, config: EnvConfig) -> None:
        _check(config)
        self._config = config
        self.max_turns = DEFAULT_MAX_TURNS if config.max_turns is None else config.max_turns
        self._names = list(config.task_names) or list(DEFAULT_TASK_NAMES)
        simplification = config.simplification or "plain"
        folder = cache_folder(config.cache_dir) / f"scienceworld-{VERSION}"
        self._folder = folder / f"format-{DEMONSTRATION_FORMAT}" / simplification
        self._variations: dict[str, tuple[list[int], list[int]]] = {}
        self._idle = IdleEnvironments(self.make)

    def tasks(self, split: str) -> list[Task]:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        names = list(self._config.ood_task_names) if split == "ood" else self._names
        if missing := [name for name in names if name not in self._variations]:
            with self._idle.borrow() as environment:
                self._variations.update({name: environment.variations(name) for name in missing})
        which = 0 if split == "train" else 1
        columns = [[Task(name, variation) for variation in self._variations[name][which]] for name in names]
        return [task for row in zip_longest(*columns) for task in row if task is not None]

    def make(self) -> ScienceWorldEnvironment:
        return ScienceWorldEnvironment(self._config)

    def demonstrate(self, task: Task) -> Demonstration:
        """The task's gold episode, from the cache folder where it was made before.

        As many JVMs run as threads call at once.

        Raises:
            ValueError: no such task, or no gold path within the limit of ticks.
            EnvironmentFailure: the JVM died or hung.
        """
        path = self._folder / task.name / f"{task.variation}.json"
        demonstration = read_demonstration(path)
        if demonstration is None:
            with self._idle.borrow() as environment:
                demonstration = _demonstrate(environment, task)
            write_demonstration(path, demonstration)
        return demonstration

    def close(self) -> None:
        """End the JVMs kept for demonstrations. The suite stays usable."""
        self._idle.close()
