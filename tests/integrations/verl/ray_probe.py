"""What test_ray.py sees of the workers: each closed step of the history goes to a file, and one worker may be killed.

RAY_PROBE_FOLDER: the files rank0_step1.pt and so on are written there. RAY_PROBE_KILL=rank1_step3: that worker sends
itself SIGKILL in that training step, inside the loss of its first micro-batch.
"""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import ray
import torch

from epo_kernels import EntropyHistory

_update, _commit = EntropyHistory.update, EntropyHistory.commit
_micro_batches: list[dict[str, torch.Tensor]] = []


@functools.wraps(_update)
def update(self, turns, entropy, mask):
    _update(self, turns, entropy, mask)
    _micro_batches.append({"turns": turns, "entropy": entropy.detach().clone(), "mask": mask})
    if os.environ.get("RAY_PROBE_KILL") == name(len(self) + 1):
        os.kill(os.getpid(), signal.SIGKILL)


@functools.wraps(_commit)
def commit(self, *args, **keywords):
    _commit(self, *args, **keywords)
    path = Path(os.environ["RAY_PROBE_FOLDER"]) / f"{name(len(self))}.pt"
    node = ray.get_runtime_context().get_node_id()
    torch.save({"micro_batches": _micro_batches, "history": self.state_dict(), "node": node}, path)
    _micro_batches.clear()


def name(step: int) -> str:
    return f"rank{os.environ['RANK']}_step{step}"


EntropyHistory.update, EntropyHistory.commit = update, commit
