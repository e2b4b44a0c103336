"""One ScienceWorld episode at a time, in its own JVM."""

from scienceworld.constants import ID2TASK

from epo_kernels.train.envs.base import (
    EnvConfig,
    Environment,
    Observation,
    StepResult,
    Task,
    clean_action,
    unknown_task_name,
)
from epo_kernels.train.envs.scienceworld.jvm import Simulator
from epo_kernels.train.envs.scienceworld.options import ScienceWorldOptions
from epo_kernels.train.envs.scienceworld.text import (
    LOOKED,
    clean_answer,
    clean_goal,
    clean_scene,
    is_understood,
)

TASK_NAMES: tuple[str, ...] = tuple(sorted(ID2TASK.values()))


class ScienceWorldEnvironment(Environment):
    """One simulator in its own JVM, started immediately. Not thread-safe: use from one thread at a time."""

    def __init__(self, config: EnvConfig) -> None:
        options: ScienceWorldOptions = config.options
        self._options = options
        self._simulator = Simulator(options.jvm_memory, config.step_timeout, config.start_timeout)
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
        """A gold path found by the simulator; it differs from call to call."""
        self._load(task.name, task.variation, with_gold=True)
        return list(self._simulator.call("getGoldActionSequence"))

    def reset(self, task: Task) -> Observation:
        """Load the task (about 90 ms; the simulator's own reset takes three times as long).

        Raises:
            ValueError: no such task type or variation.
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
        """Play one action, given as arbitrary text.

        Raises:
            RuntimeError: the episode is over.
        """
        if self._done:
            raise RuntimeError("the episode is over (or never began): reset the environment first")
        action = clean_action(action)
        answer = self._simulator.call("step", action)
        raw_score = round(100 * self._simulator.call("getScore"))
        score = min(max(raw_score, 0), 100)
        success = score == 100
        # A wrong focus leaves a permanent score of -1, often without ending the episode.
        self._done = (
            raw_score < 0
            or success
            or bool(self._simulator.call("getCompleted"))
            or self._simulator.call("getNumMoves") > self._options.tick_limit
        )
        scene = self._scene()
        is_look = answer.startswith("This ") and clean_scene(answer, "") == clean_scene(self._look, "")
        return StepResult(
            observation=Observation(self._goal, LOOKED if is_look else clean_answer(answer), scene),
            reward=self._reward(action, score),
            done=self._done,
            score=float(score),
            success=success,
            valid=is_understood(answer),
        )

    def close(self) -> None:
        self._simulator.close()

    def _load(self, name: str, variation: int, with_gold: bool = False) -> None:
        self._done = True
        self._simulator.call("load", name, variation, self._options.simplification, with_gold)

    def _scene(self) -> str:
        self._look = self._simulator.call("freeActionLook")
        return clean_scene(self._look, self._simulator.call("freeActionInventory"), self._options.scene)

    def _reward(self, action: str, score: int) -> float:
        gain = max(score - self._best_score, 0) / 100
        self._best_score = max(score, self._best_score)
        progress = 0.0 if action.lower().startswith("wait") else self._options.progress_reward * gain
        return progress + (1 - self._options.progress_reward) * (score == 100)
