"""DTensor arguments: the plain tensors the library computes with, and how gradients return to the DTensors.

Logits, hidden states, weight and bias may be DTensors. All per-token arguments are plain tensors, and the same on all
ranks of a mesh over which the DTensors are replicated.

- A vocabulary split over a one-dimensional mesh (logits with Shard(-1); a weight with Shard(0) next to DTensor hidden
  states on the same mesh) is not gathered. Its mesh becomes the `group` of `epo_kernels.shard`.
- Anything else is gathered and computed in full on each rank. With DTensor hidden states the gradient is the same on
  every rank, and each keeps its shard. With *plain* hidden states each rank is assumed to have its own batch, as under
  FSDP and DDP: gradients are averaged over the mesh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(value: Any) -> bool:
    """Whether value is a DTensor, checked without importing its module."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local_logits(logits: Any, group: ProcessGroup | None) -> tuple[Any, ProcessGroup | None]:
    """(logits, group) with plain logits: a rank's columns and the mesh's group, or the whole logits.

    Raises:
        ValueError: a group was given with a DTensor, which has its own.
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
    """(hidden, weight, bias, group) as plain tensors: a rank's rows of the head and the mesh's group, or all rows.

    Raises:
        ValueError: a group was given with DTensors, which have their own.
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
    """Whether value is split along dim over a one-dimensional mesh with more than one rank."""
    return value.device_mesh.ndim == 1 and value.device_mesh.size() > 1 and value.placements[0].is_shard(dim)


def _whole(value: Any, *, same_everywhere: bool) -> Tensor:
    """A DTensor gathered as a plain tensor on each rank; its gradient returns in the DTensor's placements.

    same_everywhere: ranks compute the same gradient; otherwise their gradients are averaged.
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
            "group must be omitted with DTensors, whose mesh says how they are split; or pass the rank's own part, "
            "weight.to_local()"
        )
