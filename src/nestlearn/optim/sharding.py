"""Parameters that are divided over processes (DTensor, FSDP2), for rules that need whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself if it is not distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor on every process, from parts distributed as `like` is."""
    joined = distributed(part, like)
    return joined.full_tensor() if isinstance(joined, DTensor) else joined


def distributed(part: Tensor, like: Tensor) -> Tensor:
    """The distributed tensor of these parts, distributed as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(
        part.reshape(local(like).shape), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def own_rows(full: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor for this process's rows of `like`, whose first dimension alone may be divided."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, distributed as `like` is; nothing is sent."""
    return own_rows(full.reshape(like.shape), like) if isinstance(like, DTensor) else full


def total(part: Tensor, like: Tensor, stacked: bool) -> Tensor:
    """The sum of `part` over the processes that hold different parts of the same tensors.

    Args:
        part: what this process computed from its part of `like`.
        like: its distribution names the processes.
        stacked: `like` is a stack of tensors along its first dimension. Processes that divide the stack hold different
            tensors, and nothing is summed over them.
    """
    if not isinstance(like, DTensor):
        return part
    placements = [Partial() if _divides(given, stacked) else Replicate() for given in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()


def undivided(like: Tensor, stacked: bool) -> bool:
    """Whether each process has whole matrices, all of them or some of a stack (`total`)."""
    return not isinstance(like, DTensor) or not any(_divides(given, stacked) for given in like.placements)


def _divides(given: Placement, stacked: bool) -> bool:
    return isinstance(given, Shard) and not (stacked and given.dim == 0)


def pooled(part: Tensor, like: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The sum over the processes that average their gradients of a parameter, and the number of these processes.

    Args:
        part: what this process computed from its part of the batch.
        like: the parameter. If it is distributed, the processes are those of its mesh.
        process_group: the processes otherwise; None: all, where torch.distributed is initialized.
    """
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return DTensor.from_local(part, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor(), mesh.size()
    if not (dist.is_available() and dist.is_initialized()):
        return part, 1
    part = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(part, group=process_group)
    return part, dist.get_world_size(process_group)


def gathered(part: Tensor, like: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The parts of the processes that `pooled` sums over, stacked in their order."""
    part = part.contiguous()
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return DTensor.from_local(part[None], mesh, [Shard(0)] * mesh.ndim, run_check=False).full_tensor()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, part, group=process_group)
    return torch.stack(parts)


def holders(like: Tensor, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes that have all of a tensor once it is collected (`whole`).

    Args:
        like: if it is divided, the processes are those that hold its parts.
        process_group: the processes otherwise, which have replicas.
    """
    if not isinstance(like, DTensor):
        return process_group
    divided = [i for i, given in enumerate(like.placements) if isinstance(given, Shard)]
    return like.device_mesh.get_group(divided[0]) if len(divided) == 1 else None


def shared(
    tensors: list[Tensor], process_group: dist.ProcessGroup | None, work: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """``work(tensors)`` on tensors of one shape that all processes of a group have: each works on its part of them.

    All get the same results, bit by bit. Without a group, the work is done here.

    Example:
        >>> shared([torch.ones(1), torch.ones(1)], None, lambda tensors: [2 * x for x in tensors])
        [tensor([2.]), tensor([2.])]
    """
    count = 1 if process_group is None else dist.get_world_size(process_group)
    if count == 1 or len(tensors) == 1:
        return work(tensors)
    rank = dist.get_rank(process_group)
    own = work(tensors[rank::count] or tensors[:1])
    # Every process sends as many; what is behind the last tensor is not read.
    sent = own[0].new_zeros(-(-len(tensors) // count), *own[0].shape)
    for place, result in zip(sent, own, strict=False):
        place.copy_(result)
    parts = sent.new_empty(count * len(sent), *sent.shape[1:])
    # Renamed in torch 2.13, where the old name warns.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(parts, sent, group=process_group)
    return [parts[i % count * len(sent) + i // count] for i in range(len(tensors))]


def is_shared(parameter: Tensor, process_group: dist.ProcessGroup | None) -> bool:
    """Whether several processes train this parameter, in parts or as replicas."""
    if isinstance(parameter, DTensor):
        return True
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def inputs_are_divided(weight: Tensor, outputs: int = 0) -> bool:
    """Whether a weight is divided over processes along another dimension than that of its `outputs`."""
    placements = weight.placements if isinstance(weight, DTensor) else ()
    return any(isinstance(given, Shard) and given.dim != outputs for given in placements)


def check_input(name: str, x: Tensor, fix: str) -> None:
    """Raises ValueError for an input of a layer that is divided over processes."""
    if isinstance(x, DTensor):
        raise ValueError(f"{name} gets an input that is distributed ({x.placements}), as in tensor parallelism; {fix}.")
