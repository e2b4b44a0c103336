"""A rollout shared by all ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from epo_kernels.train.data import Episode
from epo_kernels.train.distributed import Ranks, raise_together, told
from epo_kernels.train.envs import EnvironmentFailure
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.models.policy import casts_kept
from epo_kernels.train.rollout.rollout import Rollout


@dataclass
class SharedRollout:
    """A rollout in which each rank plays its share of the episodes; afterwards every rank has all of them."""

    rollout: Rollout  # this rank's
    ranks: Ranks
    model: PreTrainedModel | None  # the engine's model, unsharded while sampling; None if it has its own weights

    _failure: EnvironmentFailure | None = field(default=None, init=False)  # of `prefetch`, until the next `play`

    @property
    def seconds(self) -> dict[str, float]:
        return self.rollout.seconds

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Like `Rollout.prefetch`. A failure is raised by the next `play`, in which the other ranks learn of it."""
        try:
            self.rollout.prefetch(episodes[self.ranks.rank :: self.ranks.size])
        except EnvironmentFailure as failure:
            self._failure = failure

    def play(self, episodes: Sequence[Episode], report: Report = ignore) -> None:
        """Like `Rollout.play`. An exception on one rank is raised on all, after the others have finished playing.

        Raises:
            Stopped, EnvironmentFailure, PromptTooLong: as in `Rollout.play`, on all ranks.
            RuntimeError: another rank failed.
        """
        ranks, size = self.ranks, self.ranks.size
        own = episodes[ranks.rank :: size]
        failure: Exception | None
        failure, self._failure = self._failure, None
        with self._weights_ready():
            try:
                if failure:
                    raise failure
                self.rollout.play(own, lambda done: report(min(done * size, len(episodes))))
            except Exception as error:
                failure = error
        answers = ranks.gather((own, told(failure)))
        raise_together(failure, [outcome for _, outcome in answers])
        for rank, (played, _) in enumerate(answers):
            for episode, result in zip(episodes[rank::size], played, strict=True):
                vars(episode).update(vars(result))

    @contextmanager
    def _weights_ready(self) -> Iterator[None]:
        """Inside, the engine's model is whole and its weights, which no episode changes, are cast once."""
        if self.model is None:
            yield
            return
        with self.ranks.whole(self.model), casts_kept(self.model):
            yield
