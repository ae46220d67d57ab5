"""Selection in one pass: an order statistic that is exact, because a guess of it was good.

Values near a guess are counted by their bits, those beyond by their number. If the wanted rank is
among the former, its value follows. If not, the numbers say where to look in a second pass; if that
fails too, :mod:`kifmerge.tensor.selection` finds it in two others, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kifmerge.tensor.buckets import bits_of, value_of
from kifmerge.tensor.native import find_within
from kifmerge.tensor.selection import CountReduction, Part, Spread, Threshold

# Numbers next to each other that a window holds: from 1.6 % below the guess to as much above it, or
# half of that. Measured: with more of them finding those within takes longer than all the rest.
WINDOW_NUMEL = 1 << 18
_INFINITY_BITS = 0x7F800000
_BATCH_NUMEL = 1 << 18
# What is looked at together stays in cache. Where more than a sixteenth of it is in the window,
# values are counted rather than noted.
_CHUNK_NUMEL = 1 << 16
_LEAST_SPARSE = 16
_MOST_PASSES = 2
# So many windows away values may lie otherwise.
_FARTHEST = 16


def value_near(
    guess: float,
    values: Iterable[Part],
    rank: int,
    *,
    reduce_counts: CountReduction | None = None,
    spread: Spread = map,
) -> Threshold | None:
    """The rank-th smallest of all values, 1 for the smallest, and how many exceed it.

    Args:
        guess: of the value; the same in all processes.
        values: as :func:`kifmerge.tensor.selection.kth_smallest` takes them; read once or twice;
            on a CPU.
        rank: among the values of all processes.
        reduce_counts: adds up int64 counts over processes; None for one process.
        spread: applies a function to many parts.

    Returns:
        None if the value is not near the guess, or a value is NaN or has a sign.

    >>> value_near(7.99, [torch.arange(6.0), torch.arange(6.0, 11.0)], 9)
    Threshold(value=8.0, num_scores=11, num_above=2)
    >>> value_near(3.0, [torch.arange(11.0)], 9)
    """
    first: int | None = _first_bits(guess)
    for _ in range(_MOST_PASSES):
        if first is None:
            break
        seen = _count(first, values, reduce_counts, spread)
        if seen.is_odd or not seen.num_values:
            break
        own_rank = rank - seen.num_below
        if 1 <= own_rank <= seen.num_within:
            return seen.find(own_rank)
        first = seen.next_first(own_rank)
    return None


@dataclass(frozen=True, slots=True)
class _Window:
    """What a pass has seen.

    Attributes:
        first: bits of the smallest number in the window.
        counts: of the values in it, by their bits.
        num_values: of all.
        num_above: beyond the window.
        is_odd: whether a value is NaN or has a sign.
    """

    first: int
    counts: Tensor
    num_values: int
    num_above: int
    is_odd: bool

    @property
    def num_within(self) -> int:
        return int(self.counts.sum())

    @property
    def num_below(self) -> int:
        return self.num_values - self.num_above - self.num_within

    def find(self, rank: int) -> Threshold:
        """The value of this rank among those within."""
        cumulative = self.counts.cumsum(0)
        place = int(torch.searchsorted(cumulative, rank))
        num_above = self.num_above + self.num_within - int(cumulative[place])
        return Threshold(value_of(self.first + place), self.num_values, num_above)

    def next_first(self, rank: int) -> int | None:
        """Where another window should begin, if values lie there as densely as in this one."""
        density = self.num_within / WINDOW_NUMEL
        beyond = rank - (self.num_within if rank > 0 else 1)
        if abs(beyond) > _FARTHEST * self.num_within:
            return None
        edge = self.first + (WINDOW_NUMEL if rank > 0 else 0)
        bits = min(max(edge + round(beyond / density), 0), _INFINITY_BITS)
        return _first_bits(value_of(bits))


def _count(
    first: int, scores: Iterable[Part], reduce_counts: CountReduction | None, spread: Spread
) -> _Window:
    counts = torch.zeros(WINDOW_NUMEL, dtype=torch.int64)
    totals = torch.zeros(3, dtype=torch.int64)
    # Noted in one place: what is kept of each part would break up the memory of the next ones.
    batch, num_noted = torch.empty(_BATCH_NUMEL, dtype=torch.int64), 0
    for found in spread(lambda part: _look(part, first), scores):
        totals += found[:3]
        single, counted = found[4:].split([int(found[3]), found.numel() - 4 - int(found[3])])
        counts.index_add_(0, *counted.view(2, -1))
        for places in single.split(_BATCH_NUMEL):
            if num_noted + places.numel() > _BATCH_NUMEL:
                counts += torch.bincount(batch[:num_noted], minlength=WINDOW_NUMEL)
                num_noted = 0
            batch[num_noted : num_noted + places.numel()] = places
            num_noted += places.numel()
    counts += torch.bincount(batch[:num_noted], minlength=WINDOW_NUMEL)
    if reduce_counts is not None:
        counts, totals = reduce_counts(counts), reduce_counts(totals)
    num_values, num_above, num_odd = totals.tolist()
    return _Window(first, counts, num_values, num_above, num_odd > 0)


def _look(part: Part, first: int) -> Tensor:
    """What a pass sees of a part, in one int64 tensor.

    How many values; how many beyond the window; how many odd; and how many places follow, one for
    each value within. Where these are very many they are counted at once: behind the others lie
    places that are taken, and as many numbers of those who have them.
    """
    values = part if isinstance(part, Tensor) else part()
    if values.device.type != "cpu":
        return torch.tensor([0, 0, values.numel(), 0])
    num_above = num_odd = 0
    single, taken, numbers = [], [], []
    # Scratch that is asked for once breaks up no memory.
    room = np.empty(min(values.numel(), _CHUNK_NUMEL), np.uint32)
    for chunk in values.reshape(-1).split(_CHUNK_NUMEL):
        bits = bits_of(chunk)
        places, num_beyond, largest = find_within(bits, first, WINDOW_NUMEL, room)
        num_above += num_beyond
        # The bits of NaN, and of all that has a sign, are beyond those of infinity.
        num_odd += largest > _INFINITY_BITS
        if places.size * _LEAST_SPARSE <= bits.size:
            single.append(places.copy())
            continue
        found = np.bincount(places)
        taken.append(np.flatnonzero(found))
        numbers.append(found[taken[-1]])
    head = [values.numel(), num_above, num_odd, sum(places.size for places in single)]
    return torch.from_numpy(np.concatenate([np.array(head), *single, *taken, *numbers]))


def _first_bits(guess: float) -> int:
    """Bits of the smallest number of a window around a guess."""
    bits = int(np.float32(guess).view(np.uint32)) if guess > 0 else 0
    return min(max(bits - WINDOW_NUMEL // 2, 0), _INFINITY_BITS + 1 - WINDOW_NUMEL)
