"""Run by torchrun, as two processes, from test_distributed.py: a run, then what is seen of the parts. Writes JSON."""

import copy
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from epo_kernels.train.__main__ import _parse, _run, leave
from epo_kernels.train.config import ModelConfig
from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.distributed import Ranks, SharedRollout, launched
from epo_kernels.train.envs import EnvironmentFailure, Task
from epo_kernels.train.policies.policy import build_from_scratch
from epo_kernels.train.stopping import Stopped, StopRequest


class Failing:
    """A rollout that finishes its episodes, but for the second rank's, where the exception is raised."""

    def __init__(self, ranks: Ranks, failure: Exception | None) -> None:
        self.failure = None if ranks.is_first else failure
        self.rank = ranks.rank

    def play(self, episodes, report):
        for episode in episodes:
            episode.score = 10.0 * self.rank + episode.seed[-1]
        if self.failure:
            raise self.failure


def played_together(ranks: Ranks, failure: Exception | None):
    episodes = [Episode(Task("t", 0), 0, (0, Draw.EPISODE, 0, i)) for i in range(5)]
    try:
        SharedRollout(Failing(ranks, failure), ranks, None).play(episodes)
    except (Stopped, EnvironmentFailure, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return [episode.score for episode in episodes]


class Asked(StopRequest):
    """A request that only the second rank got."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._received = None if ranks.is_first else 15


def asked_to_stop(ranks: Ranks) -> str:
    try:
        ranks.check(Asked(ranks))
    except Stopped as stopped:
        return str(stopped)
    return "went on"


def sharded(ranks: Ranks) -> dict[str, object]:
    model = build_from_scratch([], ModelConfig(), seed=0).model
    plain = copy.deepcopy(model)
    ranks.shard(model.get_decoder(), model.device)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    ids = torch.arange(6)[None]
    with ranks.whole(model):  # another number of forward passes on every rank: none of them may wait for another
        logits = [model(ids).logits for _ in range(1 + 2 * ranks.rank)]
    return {
        "split": len(split),
        "all": len(list(model.parameters())),
        "local_share": sum(p.to_local().numel() for p in split) / sum(p.numel() for p in split),
        "same": all(torch.allclose(own, plain(ids).logits, atol=1e-5) for own in logits),
        "split_again": all(isinstance(p, DTensor) for p in model.model.layers.parameters()),
    }


def inspect(ranks: Ranks) -> dict[str, object]:
    return {
        "played": played_together(ranks, None),
        "stopped": played_together(ranks, Stopped(15)),
        "lost": played_together(ranks, EnvironmentFailure("it died")),
        "broken": played_together(ranks, ValueError("bad")),
        "asked": asked_to_stop(ranks),
        "dealt": list(ranks.deal("abcde")),
        "sharded": sharded(ranks),
    }


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    config, _ = _parse(arguments)
    with launched(config.model.fsdp, config.model.device) as ranks:  # one process group for both
        code = _run(config, dry=False, ranks=ranks)
        found = inspect(ranks)
        (folder / f"rank_{ranks.rank}.json").write_text(json.dumps({"code": code, **found}))
    leave(0)
