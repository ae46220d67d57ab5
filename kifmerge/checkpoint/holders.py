"""Holders: the processes of a training, each of which holds parts of the parameters (FSDP2).

Other than the ranks of a command they cannot choose who looks at a tensor: each counts what it
holds. A tensor that several hold alike (replicated, or not sharded at all) is counted by the first
of them. They talk through the training's own process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.errors import TrainingError
from kifmerge.tensor.sharding import is_sharded

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


def holders_of(tensors: Mapping[str, Tensor]) -> Ranks:
    """The processes that hold some tensors; this one alone, if none is sharded.

    Raises:
        TrainingError: tensors that lie on some of the processes only, or hold unfinished sums.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    if not sharded:
        return ALONE
    for name, tensor in sharded.items():
        _check(name, tensor)
    first: Any = next(iter(sharded.values()))
    return Holders(
        {name for name, tensor in tensors.items() if _is_counted_here(tensor)},
        first.device_mesh.device_type,
    )


def _check(name: str, tensor: Any) -> None:
    num_processes, mesh = dist.get_world_size(), tensor.device_mesh
    if mesh.size() != num_processes:
        raise TrainingError(
            f"{name} lies on {mesh.size()} of {num_processes} processes: expected every parameter "
            "to be sharded over, or replicated on, all of them"
        )
    if any(placement.is_partial() for placement in tensor.placements):
        raise TrainingError(
            f"{name} is a sum that its processes have yet to make ({tensor.placements}): expected "
            "a parameter that is sharded or replicated"
        )


def _is_counted_here(tensor: Any) -> bool:
    if not is_sharded(tensor):
        return dist.get_rank() == 0
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(position == 0 for position, placement in places if placement.is_replicate())


class Holders(Ranks):
    """This process as one of those that train together.

    Args:
        counted: names of the tensors whose elements here no process before this one holds.
        device: where the process group's tensors are.
    """

    def __init__(self, counted: set[str], device: str) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._counted = counted
        self._device = device

    def share(self, items: Iterable[_Item], size_of: Callable[[_Item], int]) -> list[_Item]:
        """Of the names of tensors, those that are counted here."""
        return [item for item in items if item in self._counted]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes."""
        on_device = values.to(self._device)
        dist.all_reduce(on_device)
        return on_device.to(values.device)

    def gather(self, value: _Value) -> list[_Value]:
        """What each process has."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def to_first(self, value: _Value) -> list[_Value]:
        """What each process has, on the first; nothing on the others."""
        found = self.gather(value)
        return found if self.is_first else []

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """What the first process makes."""
        found: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(found)
        made: _Value = found[0]
        return made

    def meet(self) -> None:
        """Wait for all processes."""
        dist.barrier()
