"""Ranks: the processes that torchrun has started, as far as one of them needs to know the others.

A process that was started alone is the only rank, and everything here costs it nothing: no socket,
no thread, no import of torch.distributed. So there is one path for one process and for many:

    with joined_ranks() as ranks:              # once, around all the work of a command
        for name in ranks.share(files, size_of): ...
        counts = ranks.sum(counts)             # every rank gets the sum
        found = ranks.gather(figures)          # every rank gets all, in the order of ranks
        made = ranks.from_first(look)          # rank 0 looks, every rank gets the answer

Every rank must come to the same meetings (sum, gather, from_first, meet) in the same order. Ranks
wait there for each other as long as all of them live, and none dies unnoticed: an error of one ends
the meeting, and the work between meetings, on all of them. Rank 0 tells it, once.

Ranks need to share a network and the folder they write to; neither memory nor a machine. While they
are joined there is a process group of torch, of gloo, which others in the process may use too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

OnProgress = Callable[[int], None]

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")

_TOLD_BY_TORCHRUN = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """This process, alone; one of many is a :class:`kifmerge.checkpoint.joined_ranks.JoinedRanks`.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
        num_local: how many of them are on this machine, and share its processors.
        local_rank: number of this process among those, from 0.
    """

    rank = 0
    size = 1
    num_local = 1
    local_rank = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def share(self, items: Iterable[_Item], size_of: Callable[[_Item], int]) -> list[_Item]:
        """Items of this rank, in their order, so that all ranks have about as much to do."""
        return shares(items, size_of, self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, which have one shape and dtype; may be in place."""
        return values

    def gather(self, value: _Value) -> list[_Value]:
        """What each rank has, plain JSON, in the order of ranks."""
        return [value]

    def to_first(self, value: _Value) -> list[_Value]:
        """What each rank has, plain JSON, on rank 0; nothing on the others."""
        return [value]

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """What rank 0 makes, plain JSON; the others wait for it."""
        return make()

    def meet(self) -> None:
        """Wait for all ranks."""

    def adding_up(self, on_progress: OnProgress) -> OnProgress:
        """What is to be told of progress, so that on rank 0 that of all is told; called once."""
        return on_progress

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let an error in here out when no rank works any longer, as the one that all end with."""
        yield


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun has started this process with; alone, if it has not.

    An error that leaves this context on one rank ends all of them. Rank 0 raises it, or what it
    knows of it; the others raise :class:`kifmerge.errors.ToldElsewhereError`, to end without a
    word.

    Raises:
        TryAgainError: the others cannot be reached, or one of them has died.
    """
    if not _are_several():
        yield ALONE
        return
    # Where torch has not been imported yet: a rank that is lost is told of without its stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from kifmerge.checkpoint.joined_ranks import joined

    with joined() as ranks:
        yield ranks


def is_first_started() -> bool:
    """Whether this process is to be rank 0, or alone."""
    return not _are_several() or os.environ["RANK"] == "0"


def _are_several() -> bool:
    """Whether torchrun, or whoever does as it does, has started several processes."""
    told = [os.environ.get(name, "") for name in _TOLD_BY_TORCHRUN]
    return all(told) and told[0].isdecimal() and int(told[0]) > 1


def shares(
    items: Iterable[_Item], size_of: Callable[[_Item], int], num_shares: int
) -> list[list[_Item]]:
    """Deal items out, the largest first, each to whom has least; every share in the items' order.

    >>> shares(["a", "bbb", "cc", "dd"], len, 2)
    [['a', 'bbb'], ['cc', 'dd']]
    """
    numbered = list(enumerate(items))
    dealt: list[list[tuple[int, _Item]]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for number, item in sorted(numbered, key=lambda pair: (-size_of(pair[1]), pair[0])):
        least = totals.index(min(totals))
        dealt[least].append((number, item))
        totals[least] += size_of(item)
    return [[item for _, item in sorted(share, key=lambda pair: pair[0])] for share in dealt]
