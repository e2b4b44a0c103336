"""A rollout that all ranks play together."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from epo_kernels.train.data import Episode
from epo_kernels.train.distributed import Ranks, raise_together, told
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.rollout.rollout import Rollout


@dataclass
class SharedRollout:
    """A rollout whose episodes are played by all ranks, each its share; afterwards every rank has all of them."""

    rollout: Rollout  # this rank's
    ranks: Ranks
    model: nn.Module | None  # what the engine samples with, whole while it does; None where it has its own weights

    @property
    def seconds(self) -> dict[str, float]:
        return self.rollout.seconds

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        self.rollout.prefetch(episodes[self.ranks.rank :: self.ranks.size])

    def play(self, episodes: Sequence[Episode], report: Report = ignore) -> None:
        """As `Rollout.play`. What stops one rank stops all, once the others have played.

        Raises:
            Stopped, EnvironmentFailure: as it does, on all ranks alike.
            RuntimeError: another rank failed.
        """
        ranks, size = self.ranks, self.ranks.size
        own = episodes[ranks.rank :: size]
        failure: Exception | None = None
        with ranks.whole(self.model) if self.model is not None else nullcontext():
            try:
                self.rollout.play(own, lambda done: report(min(done * size, len(episodes))))
            except Exception as error:
                failure = error
        answers = ranks.gather((own, told(failure)))
        raise_together(failure, [outcome for _, outcome in answers])
        for rank, (played, _) in enumerate(answers):
            for episode, result in zip(episodes[rank::size], played, strict=True):
                vars(episode).update(vars(result))
