"""A rollout that all ranks play together."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn

from epo_kernels.train.data import Episode
from epo_kernels.train.distributed import Ranks, raise_together, told
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.rollout.rollout import Rollout


class SharedRollout:
    """A rollout whose episodes are played by all ranks, each its share; afterwards every rank has all of them.

    Args:
        rollout: this rank's.
        ranks: all of them.
        model: what the engine samples with, whole while it does; None where it has weights of its own.
    """

    def __init__(self, rollout: Rollout, ranks: Ranks, model: nn.Module | None) -> None:
        self._rollout = rollout
        self._ranks = ranks
        self._model = model

    @property
    def seconds(self) -> dict[str, float]:
        return self._rollout.seconds

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        self._rollout.prefetch(episodes[self._ranks.rank :: self._ranks.size])

    def play(self, episodes: Sequence[Episode], report: Report = ignore) -> None:
        """As `Rollout.play`. What stops one rank stops all, once the others have played.

        Raises:
            Stopped, EnvironmentFailure: as it does, on all ranks alike.
            RuntimeError: another rank failed.
        """
        ranks, size = self._ranks, self._ranks.size
        own = episodes[ranks.rank :: size]
        failure: Exception | None = None
        with ranks.whole(self._model) if self._model is not None else nullcontext():
            try:
                self._rollout.play(own, lambda done: report(min(done * size, len(episodes))))
            except Exception as error:
                failure = error
        answers = ranks.gather((own, told(failure)))
        raise_together(failure, [outcome for _, outcome in answers])
        for rank, (played, _) in enumerate(answers):
            for episode, result in zip(episodes[rank::size], played, strict=True):
                vars(episode).update(vars(result))
