"""A guess of an order statistic of very many scores, from a look at some of them.

It decides how often the scores are read, and never what is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.source import Source, peek
from kifmerge.tensor.selection import kth_smallest

# Of fewer scores than this another pass costs less than a look.
LEAST_NUMEL = 1 << 22
# The scores of a sample lie together in stretches, spread evenly over all tensors.
_NUM_STRETCHES = 1 << 12
_LEAST_STRIDE = 1 << 16
_SAMPLE_NUMEL = 1 << 21
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
    return kth_smallest([sample], own_rank, reduce_counts=ranks.sum)


def _sample(scores: Source, names: Sequence[str], num_scores: int) -> Tensor | None:
    """The same share of every tensor: in one stretch of each stride, or of a smaller tensor."""
    stride = max(num_scores // _NUM_STRETCHES, _LEAST_STRIDE)
    share = min(1 / _LEAST_SPARSE, _SAMPLE_NUMEL / num_scores)
    found = [torch.empty(0)]
    for name in names:
        numel = scores.info(name).numel
        num_blocks = max(numel // stride, min(numel, 1))
        for block in range(num_blocks):
            first, stop = (numel * index // num_blocks for index in (block, block + 1))
            stretch = max(round(share * (stop - first)), 1)
            start = first + _shift(len(found), stop - first - stretch)
            values = peek(scores, name, start, start + stretch)
            if values is None or values.device.type != "cpu":
                return None
            found.append(values.float())
    return torch.cat(found)


def _shift(number: int, most: int) -> int:
    """Up to ``most``, as if at random: strides must not meet rows."""
    return (number * _GOLDEN_RATIO % (1 << 32)) * (most + 1) >> 32
