"""Bytes and time that a training step communicates, on 2 to 64 GPUs: recorded collectives, and a model of their time.

python -m bench.communication [PRESET] [--node 450] [--network 50] [--latency 10] prints the table of docs/memory.md.

No GPU and no network is involved. `recorded` runs a learner and a critic under PyTorch's fake process group, which
takes any world size in one process, and notes each collective that is issued with its bytes. `Traffic` has the formulas
that the tests hold against these records; the table applies them to a preset. Its times are a model, not measurements:
a ring moves (n - 1)/n of an all-gather's or reduce-scatter's bytes and twice as much for an all-reduce, and takes a
latency for each of its n - 1 steps (Thakur, Rabenseifner and Gropp 2005, doi 10.1177/1094342005051521). Nothing of it
overlaps with computation here, though FSDP2 tries to.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import epo_kernels as ek
from bench.memory_plan import MODELS, Case, config_of, fake_ranks, learner_and_critic, samples_of, saved
from epo_kernels.train.config import load_config
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.models.lora import merged_weights
from epo_kernels.train.models.policy import precision
from epo_kernels.train.plan.memory import Machine, MemoryPlan
from epo_kernels.train.plan.work import Work

GPUS = (2, 4, 8, 16, 32, 64)
GPUS_OF_A_NODE = 8
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
_KINDS = {
    "allgather": GATHER,
    "all_gather": GATHER,
    "reduce_scatter": SCATTER,
    "allreduce": REDUCE,
    "all_reduce": REDUCE,
}


class Recorder(TorchDispatchMode):
    """Notes the collectives issued inside: how many of each kind, and the bytes of the whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = next((kind for name, kind in _KINDS.items() if name in func.name()), None)
            if kind:
                tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
                self.calls[kind] += 1
                self.bytes[kind] += max(tensor.nbytes for tensor in tensors)
        return result


class AnsweringRanks(Ranks):
    """Ranks whose `gather` answers for the others too: scores of every sample, as alike as the samples are."""

    def gather(self, own: Any) -> list[Any]:
        found = super().gather(own)
        if isinstance(own, dict):
            found.append(dict.fromkeys(range(len(own) * self.size), next(iter(own.values()))))
        return found


@dataclass(frozen=True)
class Traffic:
    """What a step's collectives carry, as {kind: (calls, bytes of the whole tensors)}.

    Attributes:
        split, whole: parameters of the policy that FSDP splits, and that every GPU has.
        critic_whole: the latter of the critic, 0 without one.
        frozen_bytes: of the reference's layers; 0 without a reference.
        layers: modules that are gathered and reduced one at a time.
        scoring_rounds, update_rounds: micro-batches of a GPU, in scoring and in all updates together.
        updates: optimizer steps of policy or critic.
        to_vllm: whether vLLM is given the weights before the rollout.
    """

    split: int
    whole: int
    critic_whole: int
    frozen_bytes: int
    layers: int
    scoring_rounds: int
    update_rounds: int
    updates: int
    critic_rounds: int
    critic_updates: int
    to_vllm: bool

    def gathers(self) -> tuple[int, float]:
        """Each layer once per forward pass, and once more per backward pass, which checkpointing shares."""
        passes = self.scoring_rounds + 2 * self.update_rounds + self.critic_passes
        frozen = self.scoring_rounds if self.frozen_bytes else 0
        weights = 4.0 * self.split
        return self.layers * (passes + frozen), weights * (passes + self.to_vllm) + self.frozen_bytes * frozen

    @property
    def critic_passes(self) -> int:
        return (self.scoring_rounds + 2 * self.critic_rounds) if self.critic_whole else 0

    def scatters(self) -> tuple[int, float]:
        passes = self.update_rounds + (self.critic_rounds if self.critic_whole else 0)
        return self.layers * passes, 4.0 * self.split * passes

    def reduces(self) -> float:
        return 4.0 * (self.whole * self.updates + self.critic_whole * self.critic_updates)

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends."""
        return (self.gathers()[1] + self.scatters()[1] + 2 * self.reduces()) * (gpus - 1) / gpus

    def seconds(self, gpus: int, bandwidth: float, latency: float) -> float:
        """By the ring model.

        Args:
            bandwidth: of a GPU's slowest link on the ring, bytes per second and direction.
            latency: of one of the ring's steps, in seconds.
        """
        calls = self.gathers()[0] + self.scatters()[0] + 2 * (self.updates + self.critic_updates)
        return self.sent(gpus) / bandwidth + calls * (gpus - 1) * latency


def traffic_of(preset: str, gpus: int, settings: Iterable[str] = ()) -> Traffic:
    """Of a step in which every sample fills a row (`Work`)."""
    config = load_config(preset, list(settings))
    plan = MemoryPlan(config, Machine(gpus, 80e9))
    parameters, work = plan.parameters, Work.of(config, plan.parameters)
    samples = work.episodes * work.turns
    has_critic, itemsize = plan.has_critic, getattr(torch, config.model.dtype).itemsize

    def rounds(of: int) -> int:
        return math.ceil(math.ceil(of / plan.rows) / gpus)

    def updates(passes: Any) -> tuple[int, int]:
        size = passes.minibatch_size or math.ceil(samples / passes.minibatches)
        number = math.ceil(samples / size) * passes.epochs
        return number, number * rounds(size)

    own, own_rounds = updates(config.optim)
    critics, critic_rounds = updates(config.critic) if has_critic else (0, 0)
    narrow = (4 - itemsize) * parameters.linear.split
    return Traffic(
        split=parameters.all.split,
        whole=parameters.trained.whole,
        critic_whole=parameters.all.whole - parameters.outside_decoder if has_critic else 0,
        frozen_bytes=4 * parameters.all.split - narrow if plan.has_reference else 0,
        layers=parameters.layers,
        scoring_rounds=rounds(samples),
        update_rounds=own_rounds,
        updates=own,
        critic_rounds=critic_rounds,
        critic_updates=critics,
        to_vllm=config.rollout.engine == "vllm",
    )


def recorded(case: Case, rows: int) -> Recorder:
    """The collectives of a step of rank 0 in the case: weights for vLLM, scoring, and one update of each network.

    Args:
        rows: of samples per GPU and network pass.
    """
    with saved(MODELS[case.model]) as folder, fake_ranks(case.gpus) as fake:
        ranks = AnsweringRanks(fake.rank, fake.size, fake.fsdp)
        config = config_of(case, folder)
        policy, _, learner, critic = learner_and_critic(config, ranks)
        samples = samples_of(rows * case.gpus, MODELS[case.model].vocab_size)
        with precision(policy.model, config.model.dtype), Recorder() as recorder:
            deque(merged_weights(policy.model), maxlen=0)
            learner.score(samples)
            if critic:
                critic.score(samples)
                critic.update(samples, (0,))
            learner.update(samples, ek.EntropyHistory(1), 1.0, (0,))
    return recorder


def table(preset: str, node: float, network: float, latency: float) -> str:
    lines = [
        "| GPUs | micro-batches per update | all-gather | reduce-scatter | all-reduce | sent by each | time (model) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in GPUS:
        traffic = traffic_of(preset, gpus)
        bandwidth = node if gpus <= GPUS_OF_A_NODE else min(node, network)
        seconds = traffic.seconds(gpus, 1e9 * bandwidth, 1e-6 * latency)
        lines.append(
            f"| {gpus} | {traffic.update_rounds / traffic.updates:g} | {traffic.gathers()[1] / 1e12:.2f} TB | "
            f"{traffic.scatters()[1] / 1e12:.2f} TB | {traffic.reduces() / 1e12:.2f} TB | "
            f"{traffic.sent(gpus) / 1e12:.2f} TB | {seconds:,.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and modelled time of a step's collectives, on 2 to 64 GPUs.")
    parser.add_argument("preset", nargs="?", default="scienceworld_ppo_7b")
    parser.add_argument("--node", type=float, default=450.0, help="GB/s per GPU and direction within a node of 8 GPUs")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s per GPU and direction between nodes")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds of one step of a ring")
    given = parser.parse_args()
    sys.stdout.write(table(given.preset, given.node, given.network, given.latency) + "\n")


if __name__ == "__main__":
    main()
