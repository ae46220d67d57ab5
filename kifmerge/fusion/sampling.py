"""A guess of an order statistic of very many scores, from a look at some of them.

It decides how often the scores are read, and never what is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Range
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.source import Source, peek
from kifmerge.tensor.selection import kth_smallest

# Of fewer scores than this another pass costs less than a look.
LEAST_NUMEL = 1 << 22
# The scores of a sample lie together in stretches, spread evenly over all tensors.
_NUM_STRETCHES = 1 << 11
_LEAST_STRIDE = 1 << 16
_SAMPLE_NUMEL = 1 << 20
_LEAST_SPARSE = 32
_GOLDEN_RATIO = 0x9E3779B1  # of 32 bits: its multiples are spread evenly


def guess_of_rank(
    scores: Source, names: Sequence[str], rank: int, num_scores: int, ranks: Ranks
) -> float | None:
    """About the rank-th smallest of all scores; None where they are few, or cannot be sampled.

    Args:
        scores: without a sign.
        names: of the tensors that this process is to look at.
        rank: 1 for the smallest, among the scores of all processes.
        num_scores: of all processes.
        ranks: share the scores.
    """
    if num_scores < LEAST_NUMEL:
        return None
    sample = _sample(scores, names, num_scores)
    is_useful = sample is not None and not sample.isnan().any()
    found = [sample.numel() if sample is not None else 0, not is_useful]
    # All processes, or none: their caches may hold different files.
    num_sampled, num_without = ranks.sum(torch.tensor(found, dtype=torch.int64)).tolist()
    if sample is None or num_without or not num_sampled:
        return None
    own_rank = min(max(math.ceil(rank * num_sampled / num_scores), 1), num_sampled)
    if ranks.size > 1:
        return kth_smallest([sample], own_rank, reduce_counts=ranks.sum)
    values = sample.numpy()
    values.partition(own_rank - 1)  # in place: counting takes memory that a merge has not planned
    return float(values[own_rank - 1])


def _sample(scores: Source, names: Sequence[str], num_scores: int) -> Tensor | None:
    stretches = [*_stretches(scores, names, num_scores)]
    # Filled in one place: what is kept of each would break up the memory of all that comes after.
    sample = torch.empty(sum(stretch.stop - stretch.start for stretch in stretches))
    filled = 0
    for stretch in stretches:
        values = peek(scores, *stretch)
        # Numbers of 16 bits are counted whole, in one pass.
        if values is None or values.device.type != "cpu" or values.dtype == torch.bfloat16:
            return None
        sample[filled : filled + values.numel()] = values
        filled += values.numel()
    return sample


def _stretches(scores: Source, names: Sequence[str], num_scores: int) -> Iterator[Range]:
    """The same share of every tensor: in one stretch of each stride, or of a smaller tensor."""
    stride = max(num_scores // _NUM_STRETCHES, _LEAST_STRIDE)
    share = min(1 / _LEAST_SPARSE, _SAMPLE_NUMEL / num_scores)
    number = 0
    for name in names:
        numel = scores.info(name).numel
        num_blocks = max(numel // stride, min(numel, 1))
        for block in range(num_blocks):
            first, stop = (numel * index // num_blocks for index in (block, block + 1))
            length = max(round(share * (stop - first)), 1)
            start = first + _shift(number, stop - first - length)
            yield Range(name, start, start + length)
            number += 1


def _shift(number: int, most: int) -> int:
    """Up to ``most``, as if at random: strides must not meet rows."""
    return (number * _GOLDEN_RATIO % (1 << 32)) * (most + 1) >> 32
