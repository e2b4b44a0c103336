"""Collects the episodes of a training step: random tasks, and the groups to learn from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from epo_kernels.train.config import TrainConfig
from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.envs import Task
from epo_kernels.train.io.progress import Report
from epo_kernels.train.rl.algorithms import drop_groups_without_spread
from epo_kernels.train.rollout.shared import SharedRollout


@dataclass
class Collected:
    episodes: list[Episode] = field(default_factory=list)  # all
    kept: list[Episode] = field(default_factory=list)  # to learn from
    draws: int = 0  # number of sampling rounds
    seconds: dict[str, float] = field(default_factory=dict)  # time by part of the rollouts

    @property
    def played(self) -> list[Episode]:
        """The episodes not lost to environment failures."""
        return [episode for episode in self.episodes if not episode.failed]

    def metrics(self) -> dict[str, float]:
        kept = {id(episode) for episode in self.kept}
        dropped = {episode.group for episode in self.played if id(episode) not in kept}
        return {"episode/draws": self.draws, "episode/groups_dropped": len(dropped)}


@dataclass
class Collector:
    """Draws random tasks and plays a group of episodes of each.

    With `algorithm.refills` it implements DAPO's dynamic sampling (arXiv 2503.14476): groups whose episodes all have
    the same return are dropped and replaced, for up to that many rounds; then the step uses what it has.
    """

    tasks: Sequence[Task]
    rollout: SharedRollout
    config: TrainConfig

    def draw(self, step: int, attempt: int = 0, groups: int | None = None) -> list[Episode]:
        """Unplayed episodes: `group_size` for each of `groups` tasks (None: algorithm.groups)."""
        config = self.config
        most, size = config.algorithm.groups, config.algorithm.group_size
        groups = most if groups is None else groups
        generator = np.random.default_rng([config.seed, Draw.TASKS, step, *([attempt] if attempt else [])])
        chosen = generator.choice(len(self.tasks), groups, replace=groups > len(self.tasks))
        return [
            Episode(self.tasks[task], group, (config.seed, Draw.EPISODE, step, group * size + member))
            for group, task in enumerate(chosen, start=attempt * most)
            for member in range(size)
        ]

    def collect(self, step: int, bar: Callable[[int], AbstractContextManager[Report]]) -> Collected:
        """Play until there is something to learn from. `bar(number of episodes)` shows the progress of each round.

        If every episode is lost to its environment, others are drawn, until the pool raises EnvironmentFailure.
        """
        algorithm, collected = self.config.algorithm, Collected()
        for attempt in count():
            missing = algorithm.groups - len({episode.group for episode in collected.kept})
            drawn = self.draw(step, attempt, missing)
            with bar(len(drawn)) as report:
                self.rollout.play(drawn, report)
            for name, spent in self.rollout.seconds.items():
                collected.seconds[name] = collected.seconds.get(name, 0.0) + spent
            collected.draws += 1
            collected.episodes += drawn
            played = [episode for episode in drawn if not episode.failed]
            collected.kept += drop_groups_without_spread(played) if algorithm.refills else played
            enough = len({episode.group for episode in collected.kept}) >= algorithm.groups
            if collected.played and (enough or attempt >= algorithm.refills):
                break
        collected.kept = collected.kept or collected.played
        return collected
