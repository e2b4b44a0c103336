"""Several processes on one machine (`torchrun`), each with its own GPU, and how they divide the work.

Every rank plays its share of the episodes and then receives all of them, so that history, advantages and minibatches
are the same everywhere. Each rank computes its share of a minibatch's micro-batches, and gradients are summed. Weights
are replicated, or each layer's weights are sharded over the ranks (FSDP2). Only the first rank writes the run's folder.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from epo_kernels.train.config import ConfigError
from epo_kernels.train.envs import EnvironmentFailure
from epo_kernels.train.io.failures import PromptTooLong
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.io.stopping import Stopped, StopRequest

Item = TypeVar("Item")
_RAISED_TOGETHER = {known.__name__: known for known in (EnvironmentFailure, PromptTooLong)}  # after them a run is saved
TIMEOUT = timedelta(hours=2)  # for waiting on other ranks: their rollouts, or cloning on the first rank


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that train together. With a single process, nothing communicates."""

    rank: int = 0
    size: int = 1
    fsdp: bool = False  # shard the weights of layers (`shard`) instead of replicating them

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.size > 1 else None

    def wait(self) -> None:
        """Block until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, own: Item) -> list[Item]:
        """The items of all ranks, in rank order."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def on_first(self, act: Callable[[], object]) -> None:
        """Call `act` on the first rank only. A ConfigError there is raised on every rank."""
        error: ConfigError | None = None
        if self.is_first:
            try:
                act()
            except ConfigError as refusal:
                error = refusal
        refused, *_ = self.gather(str(error) if error else None)
        if refused is not None:
            raise error or ConfigError(refused)

    def check(self, stop: StopRequest) -> None:
        """Raise Stopped on every rank if any rank was asked to stop, so that none is left waiting."""
        own: Stopped | None = None
        try:
            stop.check()
        except Stopped as stopped:
            own = stopped
        raise_together(own, self.gather(told(own)))

    def deal(self, batches: Sequence[list[Item]], report: Report = ignore) -> Iterator[tuple[list[Item], bool]]:
        """This rank's share of the batches, the same number for every rank, since all take part in every collective.

        If the batches cannot be divided evenly, some are dealt twice, the second time with False: compute, do not
        count. `report` receives the number of items in the batches that all ranks have finished.
        """
        done = 0
        for start in range(0, len(batches), self.size):
            index = start + self.rank
            yield (batches[index], True) if index < len(batches) else (batches[start], False)
            done += sum(map(len, batches[start : start + self.size]))
            report(done)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum over the ranks, except for gradients that FSDP already summed in backward."""
        if self.size == 1:
            return
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def shard(self, decoder: PreTrainedModel, device: torch.device) -> None:
        """Shard every layer's weights over the ranks, in place; embedding, last norm, head and adapters stay whole.

        The head stays whole because the loss needs all of it for every chunk of tokens. A decoder that is already
        sharded is left unchanged.

        Args:
            decoder: its weights may still be on the meta device.
            device: their target device.

        Raises:
            ConfigError: the model's layers are not found.
        """
        if not self.fsdp or isinstance(decoder, FSDPModule):
            return
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            raise ConfigError(f"model.fsdp: {type(decoder).__name__} has no `layers`; set model.fsdp=false")
        mesh = init_device_mesh(device.type, (self.size,))
        layers = cast(Sequence[nn.Module], decoder.layers)
        adapters = {parameter for name, parameter in decoder.named_parameters() if "lora_" in name}
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
        whole = {parameter for parameter in decoder.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(decoder, mesh=mesh, ignored_params=whole)
        for module in decoder.modules():
            if isinstance(module, FSDPModule):
                # Sums rather than means, because the loss is normalised globally; unscaled sums, because of gloo.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Within this context every rank has all weights and may run the model any number of times."""
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in shards:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()


@contextmanager
def launched(fsdp: bool, device: str) -> Iterator[Ranks]:
    """The ranks of a `torchrun`, or only this process without one.

    Args:
        device: model.device of the configuration; with "auto" or "cuda" each rank gets its own GPU, if there are any.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Objects are sent with gloo; tensors on a GPU with NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, fsdp)
    finally:
        dist.destroy_process_group()


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank ended or doesn't answer: NCCL has a type for it, gloo a text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def told(failure: Exception | None) -> tuple[str, str | int] | None:
    """The description of an exception that is sent to other ranks."""
    if isinstance(failure, Stopped):
        return "stopped", failure.signal
    return None if failure is None else (type(failure).__name__, str(failure))


def raise_together(own: Exception | None, failures: Sequence[tuple[str, str | int] | None]) -> None:
    """Raise this rank's own exception, or that of the first rank that has one."""
    if own:
        raise own
    for rank, failure in enumerate(failures):
        if failure:
            kind, detail = failure
            if kind == "stopped":
                raise Stopped(int(detail))
            if known := _RAISED_TOGETHER.get(kind):
                raise known(f"rank {rank}: {detail}")
            raise RuntimeError(f"rank {rank} failed: {kind}: {detail}")
