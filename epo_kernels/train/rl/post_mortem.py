"""Saves the batch of an update with a non-finite loss or gradient for analysis: safetensors and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epo_kernels.train.data import Sample


@dataclass(frozen=True)
class Circumstances:
    """The result of the update. JSON has no NaN or infinity, so numbers that may be either are stored as text."""

    network: str  # policy | critic
    updates_in_a_row: int  # consecutive non-finite updates
    loss: str
    grad_norm: str
    nonfinite_tokens: int  # for the critic: states
    penalty_weight: float | None  # None: the critic's loss has no penalty
    nonfinite_weights: list[str]  # names of parameters with NaN or infinity: if any, the batch is not the cause

    @classmethod
    def of(
        cls,
        network: str,
        model: nn.Module,
        updates_in_a_row: int,
        loss: Tensor,
        grad_norm: float,
        nonfinite_tokens: int,
        penalty_weight: float | None = None,
    ) -> "Circumstances":
        came_to = str(float(loss)), str(grad_norm)
        return cls(network, updates_in_a_row, *came_to, nonfinite_tokens, penalty_weight, nonfinite_weights(model))


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Names of parameters with NaN or infinity. For a sharded model, all ranks must call it."""
    finite = {name: parameter.isfinite().all() for name, parameter in model.named_parameters()}
    whole = {name: flag.full_tensor() if isinstance(flag, DTensor) else flag for name, flag in finite.items()}
    return [name for name, flag in whole.items() if not flag]


class NonFiniteError(RuntimeError):
    """Too many consecutive updates had a non-finite loss or gradient. Carries the last one's batch."""

    def __init__(self, samples: Sequence[Sample], circumstances: Circumstances) -> None:
        self.samples = list(samples)
        self.circumstances = circumstances
        rate = "optim.lr" if circumstances.network == "policy" else "critic.lr"
        cause = (
            f"weights are not finite ({', '.join(circumstances.nonfinite_weights[:3])}): lower {rate}"
            if circumstances.nonfinite_weights
            else "all weights are finite, so check the batch and the loss settings"
        )
        updates = f"{circumstances.updates_in_a_row} {circumstances.network} updates"
        came_to = f"loss {circumstances.loss}, gradient norm {circumstances.grad_norm}"
        super().__init__(
            f"{updates} in a row had a non-finite loss or gradient ({came_to}; optim.max_skipped_updates); {cause}"
        )


def save_batch(folder: Path, error: NonFiniteError) -> Path:
    """Write `folder`/batch.safetensors and `folder`/circumstances.json; `load_batch` reads the samples back."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Sample)):
        values = [getattr(sample, name) for sample in error.samples]
        if any(value is None for value in values):
            continue
        if isinstance(values[0], list):
            tensors[name] = torch.tensor([number for value in values for number in value], dtype=torch.int64)
            tensors[f"{name}.lengths"] = torch.tensor([len(value) for value in values])
        elif isinstance(values[0], Tensor):
            tensors[f"{name}.by_token"] = torch.cat(values)
        else:
            tensors[name] = torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)
    save_file(tensors, folder / "batch.safetensors")
    facts = json.dumps(asdict(error.circumstances), indent=1)
    (folder / "circumstances.json").write_text(facts + "\n", encoding="utf-8")
    return folder


def load_batch(folder: Path) -> list[Sample]:
    """The samples saved by `save_batch`, in the form accepted by `Learner.update` and `Critic.update`."""
    tensors = load_file(folder / "batch.safetensors")
    widths = tensors["response_ids.lengths"].tolist()
    columns: dict[str, Sequence[object]] = {}
    for name in (field.name for field in fields(Sample)):
        if f"{name}.lengths" in tensors:
            columns[name] = [row.tolist() for row in tensors[name].split(tensors[f"{name}.lengths"].tolist())]
        elif f"{name}.by_token" in tensors:
            columns[name] = tensors[f"{name}.by_token"].split(widths)
        elif name in tensors:
            columns[name] = tensors[name].tolist()
    return [Sample(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
