"""Tensors sharded over processes: DTensors, as ``fully_shard`` (FSDP2) makes of parameters.

Every process works on the elements that it holds. What depends on all of them at once (a count, a
bound, a yes or no) is brought together; a tensor is gathered whole only to be written to a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: one that lies on several processes."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The elements that this process holds, in the same memory.

    Shards may be uneven, and empty on some processes; what FSDP2 pads them with is no part of them.

    >>> whole = torch.ones(2)
    >>> local_part(whole) is whole
    True
    """
    return cast("DTensor", tensor.detach()).to_local() if is_sharded(tensor) else tensor


def sharded_like(own: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded as another one is, as a DTensor.

    Args:
        own: shaped as the local part of ``like``, on any device.
        like: a DTensor; a tensor that is none gives back ``own``.
    """
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    of = cast("DTensor", like)
    return DTensor.from_local(
        own.to(of.device_mesh.device_type),
        of.device_mesh,
        of.placements,
        run_check=False,
        shape=of.shape,
        stride=of.stride(),
    )


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """The elements of a whole tensor that this process holds of another one of its shape."""
    if not is_sharded(like) or is_sharded(whole):
        return local_part(whole)
    from torch.distributed.tensor import distribute_tensor

    of = cast("DTensor", like)
    # Every process has the whole: each takes its part, and nothing is sent.
    return distribute_tensor(
        whole.to(of.device_mesh.device_type), of.device_mesh, of.placements, src_data_rank=None
    ).to_local()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of a DTensor all processes must ask for it together."""
    return cast("DTensor", tensor.detach()).full_tensor() if is_sharded(tensor) else tensor


def true_everywhere(found: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether it is true on all processes, if any of the tensors is sharded over them.

    >>> true_everywhere(True, [torch.ones(2)])
    True
    """
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return found
    device = cast("DTensor", sharded).device_mesh.device_type
    answer = torch.tensor(int(found), dtype=torch.int32, device=device)
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN)
    return bool(answer.item())
