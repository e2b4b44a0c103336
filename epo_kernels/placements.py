"""DTensor arguments: what the library computes with in their place, and how gradients find back to them.

Logits, hidden states, weight and bias may be DTensors; everything that is known of the tokens is plain, and the same on
all ranks of the mesh wherever those are replicated.

- A vocabulary split over a mesh of one dimension (logits that are Shard(-1); a weight that is Shard(0), beside hidden
  states that are a DTensor of the same mesh): nothing of it is gathered, its mesh is the `group` of
  `epo_kernels.shard`.
- Anything else is gathered, and computed whole on each rank. Beside hidden states that are a DTensor the gradient is
  the same on every rank, and each keeps its share. Beside *plain* hidden states a rank is taken to have a batch of its
  own, as under FSDP and DDP: gradients are averaged over the mesh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(value: Any) -> bool:
    """Whether value is a DTensor, whose module isn't imported to find out."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local_logits(logits: Any, group: ProcessGroup | None) -> tuple[Any, ProcessGroup | None]:
    """(logits, group) with plain logits: a rank's columns and the mesh's group, or whole logits.

    Raises:
        ValueError: a group beside a DTensor, which has its own.
    """
    if not is_dtensor(logits):
        return logits, group
    _refuse_group(group)
    if _is_split(logits, logits.dim() - 1):
        return logits.to_local(), logits.device_mesh.get_group()
    return _whole(logits, same_everywhere=True), None


def local_head(
    hidden: Any, weight: Any, bias: Any, group: ProcessGroup | None
) -> tuple[Any, Any, Any, ProcessGroup | None]:
    """(hidden, weight, bias, group) as plain tensors: a rank's rows of the head and the mesh's group, or whole.

    Raises:
        ValueError: a group beside DTensors, which have their own.
    """
    if not any(map(is_dtensor, (hidden, weight, bias))):
        return hidden, weight, bias, group
    _refuse_group(group)
    heads = [head for head in (weight, bias) if head is not None]
    if is_dtensor(hidden) and all(
        is_dtensor(head) and _is_split(head, 0) and head.device_mesh == hidden.device_mesh for head in heads
    ):
        whole = _whole(hidden, same_everywhere=True)
        return whole, weight.to_local(), None if bias is None else bias.to_local(), weight.device_mesh.get_group()
    same = is_dtensor(hidden)

    def plain(value: Any) -> Any:
        return _whole(value, same_everywhere=same) if is_dtensor(value) else value

    return plain(hidden), plain(weight), plain(bias), None


def _is_split(value: Any, dim: int) -> bool:
    """Whether value is split along dim over a mesh of one dimension with company."""
    return value.device_mesh.ndim == 1 and value.device_mesh.size() > 1 and value.placements[0].is_shard(dim)


def _whole(value: Any, *, same_everywhere: bool) -> Tensor:
    """The whole of a DTensor as a plain tensor on each rank; its gradient comes back in the DTensor's placements.

    same_everywhere: ranks make the same gradient of it; else their own ones are averaged.
    """
    from torch.distributed.tensor import Partial, Replicate

    dims = value.device_mesh.ndim
    gathered = value.redistribute(placements=[Replicate()] * dims)
    if same_everywhere:
        return gathered.to_local()
    local = gathered.to_local(grad_placements=[Partial()] * dims)
    if local.requires_grad:
        ranks = value.device_mesh.size()
        local.register_hook(lambda gradient: gradient / ranks)
    return local


def _refuse_group(group: ProcessGroup | None) -> None:
    if group is not None:
        raise ValueError(
            "group must be left out beside DTensors, whose mesh says how they are split; or give the rank's own part, "
            "weight.to_local()"
        )
