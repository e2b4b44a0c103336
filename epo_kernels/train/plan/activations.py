"""Memory of a forward and backward pass, found by running the model's own code on tensors without data.

PyTorch's fake tensors have shapes, dtypes and storages of the right size, and no memory. So activations are counted
exactly, for any architecture: what autograd saves, what checkpointing computes again, and the copies that autocast
makes. Korthikanti et al. (arXiv 2205.05198) give formulas for one architecture; these counts include its details.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from epo_kernels.train.config import ConfigError, ModelConfig
from epo_kernels.train.data import MiniBatch
from epo_kernels.train.models.policy import checkpointing, precision, response_hidden
from epo_kernels.train.plan.architecture import build


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of tensors that exist at once.

    Args:
        known: tensors from before, which don't count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._ignored = [tensor.untyped_storage() for tensor in known]  # kept, since their ids are
        self._sizes |= {storage._cdata: 0 for storage in self._ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor from now until it is freed; once only, whatever views it has."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage by its size from now on."""
        if storage._cdata in self._sizes:
            self.live += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


_Shape = tuple[int, int, int]  # rows, width, responses
_counts: dict[tuple[str, str, _Shape, bool], Activations] = {}  # seconds each for a large model


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights and the gradients that exist already."""

    saved: float  # at the end of the decoder's forward pass, when the loss begins
    peak: float  # the most in the forward and backward pass of the decoder


class ActivationModel:
    """Activations of a micro-batch as a function of its rows of tokens: two counts and the line through them.

    Args:
        width: tokens of a row.
        responses: how many of them the policy wrote.
        casts_kept: whether autocast keeps its copies of the weights (`casts_kept` of the learner).
    """

    def __init__(
        self, architecture: PreTrainedConfig, model: ModelConfig, width: int, responses: int, casts_kept: bool
    ) -> None:
        self._one, self._two = (
            _cached_count(architecture, model, (rows, width, responses), casts_kept) for rows in (1, 2)
        )

    def at(self, rows: int) -> Activations:
        one, two = self._one, self._two
        more = rows - 1
        return Activations(one.saved + more * (two.saved - one.saved), one.peak + more * (two.peak - one.peak))


def _cached_count(architecture: PreTrainedConfig, model: ModelConfig, shape: _Shape, casts_kept: bool) -> Activations:
    key = architecture.to_json_string(), repr(model), shape, casts_kept
    if key not in _counts:
        _counts[key] = _count(architecture, model, shape, casts_kept)
    return _counts[key]


def _count(architecture: PreTrainedConfig, model: ModelConfig, shape: _Shape, casts_kept: bool) -> Activations:
    try:
        with torch.device("meta"):
            policy = build(architecture, model)
        with FakeTensorMode():
            _make_fake(policy)
            decoder = policy.get_decoder()
            for parameter in policy.parameters():  # as in all micro-batches but the first: they add to gradients
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            batch = _batch(*shape)
            counted = LiveBytes([*policy.parameters(), *policy.buffers(), *gradients])
            with counted, precision(policy, model.dtype), checkpointing(policy, model.gradient_checkpointing):
                torch.set_autocast_cache_enabled(casts_kept)
                for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids, batch.places):
                    counted.add(tensor)
                hidden = response_hidden(decoder, batch)
                saved = counted.live
                hidden.backward(torch.empty_like(hidden))
            return Activations(saved, counted.peak)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"model.name_or_path={model.name_or_path}: --plan can't count the activations of {type(policy).__name__}, "
            "whose shapes depend on the data (as in a mixture of experts); measure one step on a GPU instead"
        ) from error


def _make_fake(policy: PreTrainedModel) -> None:
    """Put the parameters and buffers of a model on the meta device onto the CPU, as fake tensors; tied ones stay so."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(_empty_like(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _empty_like(buffer)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _batch(rows: int, width: int, responses: int) -> MiniBatch:
    """Full rows, each one sequence that ends in a response."""
    ids = torch.zeros(rows, width, dtype=torch.int64)
    places = torch.zeros(rows, responses, dtype=torch.int64)
    return MiniBatch(
        input_ids=ids,
        attention_mask=torch.ones(rows, 1, width, width, dtype=torch.bool),
        position_ids=torch.zeros_like(ids),
        places=places,
        tokens=places,
        mask=places.bool(),
        turns=places,
        num_sampled=rows * responses,
        num_padding=0,
        advantages=None,
        old_log_probs=None,
        ref_log_probs=None,
        is_weights=None,
        values=None,
        returns=None,
    )
