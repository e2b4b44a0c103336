"""ScienceWorld (Wang et al. 2022), the real simulator: 30 types of science tasks in a text house.

Success is a score of 100. The published EPO code counts "done and score > 0" instead, which waiting alone often
achieves; it is reported separately as `official_success`.

With w = `env.options.progress_reward`, the reward of a step is w·(gain of the best score so far)/100, plus 1 − w on
success. A return is therefore in 0..1, and no partial score outweighs a completion. The best score never falls, so a
wrong focus (which ends the episode) loses nothing compared with idling; and waiting earns no progress.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from epo_kernels.train.envs.base import SPLITS, Demonstration, EnvConfig, Task, unknown_task_name
from epo_kernels.train.envs.demonstrations import cache_folder, play, read_demonstration, write_demonstration
from epo_kernels.train.envs.scienceworld.options import ScienceWorldOptions
from epo_kernels.train.envs.suite import Suite

if TYPE_CHECKING:  # requires the package scienceworld
    from epo_kernels.train.envs.scienceworld.environment import ScienceWorldEnvironment

DEMONSTRATION_FORMAT = 1  # increase when observations change: cached demonstrations contain old ones


def _is_needless(action: str, answer: str) -> bool:
    return action == "look around" or answer.endswith("is already open.")


# Actions to drop from a gold path, the most aggressive option first: some tasks need their waits.
_CLEANINGS: tuple[Callable[[str, str], bool], ...] = (
    lambda action, answer: _is_needless(action, answer) or action.startswith("wait"),
    _is_needless,
)


def _demonstrate(environment: "ScienceWorldEnvironment", task: Task) -> Demonstration:
    """Play a gold path, without its idle moves if it still scores 100.

    Raises:
        ValueError: no gold path scores 100 within the tick limit.
    """
    environment.reset(task)  # raises for a variation that does not exist
    gold, answers = play(environment, task, environment.gold_actions(task))
    if gold.score == 100:
        for is_idle in _CLEANINGS:
            kept = [a for a, answer in zip(gold.actions, answers, strict=True) if not is_idle(a, answer)]
            demonstration, _ = play(environment, task, kept)
            if demonstration.score == 100:
                return demonstration
        return gold
    raise ValueError(
        f"the gold path of {task.name}, variation {task.variation}, must score 100, got {gold.score:g} after "
        f"{len(gold.actions)} actions; if it is only too long, raise env.options.tick_limit"
    )


class ScienceWorldSuite(Suite):
    """ScienceWorld's tasks.

    "train" consists of the training variations of `task_names`, "iid" of their unseen ones (dev, then test), "ood" of
    the unseen ones of `ood_task_names`. Task types alternate, so the first n tasks always form a balanced panel.

    Raises:
        ValueError: unknown task type.
    """

    Options = ScienceWorldOptions
    panels = ("iid", "ood", "train")
    requires: ClassVar = {"scienceworld": "epo-kernels[scienceworld]"}

    def __init__(self, config: EnvConfig) -> None:
        from scienceworld.version import __version__ as version

        from epo_kernels.train.envs.scienceworld.environment import TASK_NAMES

        super().__init__(config)
        self._options: ScienceWorldOptions = config.options
        for name in [*self._options.task_names, *self._options.ood_task_names]:
            if name not in TASK_NAMES:
                raise ValueError(
                    "env.options.task_names, env.options.ood_task_names: "
                    f"{unknown_task_name('ScienceWorld', name, TASK_NAMES)}"
                )
        folder = cache_folder(config.cache_dir) / f"scienceworld-{version}" / f"format-{DEMONSTRATION_FORMAT}"
        self._folder = folder / (self._options.simplification or "plain")
        if self._options.scene != "full":
            self._folder /= f"scene-{self._options.scene}"
        self._variations: dict[str, tuple[list[int], list[int]]] = {}

    def tasks(self, split: str) -> list[Task]:
        """Raises ValueError for an unknown split, or for "ood" if no task type is held out."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        names = self._options.ood_task_names if split == "ood" else self._options.task_names
        if not names:
            raise ValueError("evaluate.panels has ood: name its held-out task types in env.options.ood_task_names")
        if missing := [name for name in names if name not in self._variations]:
            with self.borrow() as environment:
                self._variations.update({name: environment.variations(name) for name in missing})
        which = 0 if split == "train" else 1
        return self.in_turns([[Task(name, number) for number in self._variations[name][which]] for name in names])

    def make(self) -> "ScienceWorldEnvironment":
        from epo_kernels.train.envs.scienceworld.environment import ScienceWorldEnvironment

        return ScienceWorldEnvironment(self.config)

    def demonstrate(self, task: Task) -> Demonstration:
        """The task's gold episode, read from the cache folder if it was computed before.

        Uses as many JVMs as there are concurrent callers.

        Raises:
            ValueError: no such task, or no gold path within the tick limit.
        """
        path = self._folder / task.name / f"{task.variation}.json"
        demonstration = read_demonstration(path)
        if demonstration is None:
            with self.borrow() as environment:
                demonstration = _demonstrate(environment, task)
            write_demonstration(path, demonstration)
        return demonstration
