"""The parts of a training run, and how their state is saved and restored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import epo_kernels as ek
from epo_kernels.train.config import ConfigError, TrainConfig, to_yaml
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.envs import Suite, Task
from epo_kernels.train.io.checkpoint import rng_state, save_checkpoint, set_rng_state
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.resume import Origin
from epo_kernels.train.io.tracking import Tracker
from epo_kernels.train.io.watch import CollapseWatch
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rl.collect import Collector
from epo_kernels.train.rl.critic import Critic
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rollout.engine import Engine, StreamingEngine
from epo_kernels.train.rollout.shared import SharedRollout


@dataclass
class Parts:
    """The connected parts of a run, constructed by `build`.

    Attributes:
        tracker, watch: None in a dry run.
    """

    config: TrainConfig
    ranks: Ranks
    display: Display
    run_dir: Path  # the run's folder; on ranks other than the first, a temporary one
    suite: Suite
    tasks: Sequence[Task]  # training tasks
    panels: Mapping[str, Sequence[Task]]  # evaluation tasks by panel
    policy: Policy
    engine: Engine | StreamingEngine
    rollout: SharedRollout  # plays any episodes
    collector: Collector  # plays a step's episodes
    history: ek.EntropyHistory
    learner: Learner
    critic: Critic | None  # with PPO
    start: int  # the step before the first one; for a branch, the step of its checkpoint
    step: int  # the last completed step
    tracker: Tracker = field(init=False)
    watch: CollapseWatch = field(init=False)

    def save(self) -> None:
        """Write a checkpoint of the last completed step. All ranks must call it.

        Raises:
            SaveError: nothing was saved; earlier checkpoints are intact.
        """
        state = {
            "step": self.step,
            "config": to_yaml(self.config),
            "learner": self.learner.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "history": self.history.state_dict(),
            "rng": rng_state(),
        }
        weights = self.policy.full_weights() if self.ranks.fsdp else None
        if self.ranks.is_first:
            write = partial(self.policy.save, weights=weights)
            with self.display.bar(f"saving step {self.step}", None):
                save_checkpoint(self.run_dir / "checkpoints", self.step, write, state, self.config.checkpoint.keep)

    def restore(self, origin: Origin) -> None:
        """Continue from a checkpoint whose policy is already loaded.

        Raises:
            ConfigError: the environment differs from the one the run began with.
        """
        state: dict[str, Any] = origin.state
        self.step = origin.step
        self.learner.load_state_dict(state["learner"])
        if self.critic and state["critic"] is not None:
            self.critic.load_state_dict(state["critic"])
        elif self.critic:
            self.display.say("the run that this one branches from had no critic: training a new one")
        try:
            self.history.load_state_dict(state["history"])
        except ValueError as error:
            if not origin.is_branch:
                raise ConfigError(f"{error}; the environment differs from the one the run began with") from error
            self.display.say(f"the entropy history starts empty: {error}")
        set_rng_state(state["rng"])
