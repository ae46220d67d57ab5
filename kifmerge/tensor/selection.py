"""Selection: the exact threshold above which a parameter is important, in constant memory.

The threshold is one order statistic: with n scores and important fraction f it is the
(n - ceil(f*(n - 1)))-th smallest, and a parameter is important when its score is strictly greater.
For f = 0.2 this gives the mask of ``scores > torch.quantile(scores, 0.8)``, without its limit of
2^24 values and without interpolation.

It is found in two passes over the scores with 65,536 counters each: the upper 16 bits of a float32
bit pattern choose a bucket, the lower 16 bits the value inside it. For bfloat16 the upper 16 bits
are the whole value, and one pass is enough. Counts of several streams (shards, processes) add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "tensor"]
CountReduction = Callable[[Tensor], Tensor]

CHUNK_NUMEL = 1 << 20
_NUM_BUCKETS = 1 << 16
_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The value a score must exceed to be important.

    Attributes:
        value: the order statistic x; important means score > x.
        num_scores: how many scores it was chosen from.
        num_above: how many of them exceed it. 0 when all scores are equal.
    """

    value: float
    num_scores: int
    num_above: int

    @property
    def is_degenerate(self) -> bool:
        """Whether nothing is important although something was asked for: constant scores."""
        return self.num_above == 0


def threshold_rank(num_scores: int, important_fraction: float | str | Fraction) -> int:
    """Rank k of the threshold among ``num_scores`` values, 1 for the smallest.

    The fraction is taken as the decimal it is written as, so that 0.2 of 11 values is exact.

    >>> threshold_rank(11, 0.2), threshold_rank(10, "0.2"), threshold_rank(10, 1)
    (9, 8, 1)

    Raises:
        ValueError: no scores, or a fraction outside [0, 1].
    """
    fraction = Fraction(str(important_fraction))
    if not 0 <= fraction <= 1:
        raise ValueError(f"important fraction must lie in [0, 1], found {important_fraction}")
    if num_scores < 1:
        raise ValueError("no scores to choose a threshold from")
    return num_scores - math.ceil(fraction * (num_scores - 1))


def importance_threshold(
    scores: Iterable[Tensor],
    important_fraction: float | str | Fraction,
    *,
    reduce_counts: CountReduction | None = None,
) -> Threshold:
    """Exact threshold over all the given score tensors together.

    Args:
        scores: score tensors of any shape, float32, bfloat16 or float16; iterated at most twice,
            so pass a list or an object whose ``__iter__`` starts anew, not a generator.
        important_fraction: share of scores to be found important, in [0, 1].
        reduce_counts: adds up int64 counts over processes; None for one process.

    Raises:
        ValueError: no scores, NaN among them, or a fraction outside [0, 1].
        TypeError: another dtype, or an iterable that cannot be iterated twice.

    >>> importance_threshold([torch.arange(6.0), torch.arange(6.0, 11.0)], 0.2)
    Threshold(value=8.0, num_scores=11, num_above=2)
    """
    upper = _count(scores, _upper_counts, reduce_counts)
    num_scores = int(upper.sum())
    rank = threshold_rank(num_scores, important_fraction)
    bucket, rank_in_bucket = _locate(upper, rank)
    lower = _count(scores, lambda chunk: _lower_counts(chunk, bucket), reduce_counts)
    low_bits, _ = _locate(lower, rank_in_bucket)
    num_above = int(upper[bucket + 1 :].sum()) + int(lower[low_bits + 1 :].sum())
    return Threshold(_value(bucket, low_bits), num_scores, num_above)


def mask_above(scores: Tensor, threshold: Threshold) -> Tensor:
    """Bool mask of the scores that exceed the threshold, compared in float32 whatever their dtype.

    >>> mask_above(torch.tensor([1.0, 2.0, 3.0]), Threshold(2.0, 3, 1))
    tensor([False, False,  True])
    """
    return scores.float() > threshold.value


def kth_smallest(scores: Iterable[Tensor], rank: int) -> float:
    """The rank-th smallest of all values, 1 for the smallest; -0.0 and 0.0 are one value.

    >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([2.0])], 2)
    2.0

    Raises:
        ValueError: rank outside 1..n, or NaN among the values.
    """
    upper = _count(scores, _upper_counts, None)
    num_values = int(upper.sum())
    if not 1 <= rank <= num_values:
        raise ValueError(f"rank must lie in 1..{num_values}, found {rank}")
    bucket, rank_in_bucket = _locate(upper, rank)
    lower = _count(scores, lambda chunk: _lower_counts(chunk, bucket), None)
    return _value(bucket, _locate(lower, rank_in_bucket)[0])


def _count(
    tensors: Iterable[Tensor],
    counts_of: Callable[[Tensor], Tensor],
    reduce_counts: CountReduction | None,
) -> Tensor:
    if isinstance(tensors, Iterator):
        raise TypeError("scores are read twice: pass a list or a re-iterable, not an iterator")
    total = torch.zeros(_NUM_BUCKETS, dtype=torch.int64)
    for tensor in tensors:
        for chunk in _chunks(tensor):
            total += counts_of(chunk)
    return total if reduce_counts is None else reduce_counts(total)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.dtype not in _SUPPORTED:
        raise TypeError(f"scores must be float32, bfloat16 or float16, found {tensor.dtype}")
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK_NUMEL):
        yield flat[start : start + CHUNK_NUMEL]


def _ordered_bits(chunk: Tensor) -> Tensor:
    """int32 keys that order as the float32 values do, with -0.0 equal to 0.0."""
    bits = (chunk.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper_counts(chunk: Tensor) -> Tensor:
    if bool(chunk.isnan().any()):
        raise ValueError("NaN among the scores")
    upper = (_ordered_bits(chunk) >> 16) + (_NUM_BUCKETS // 2)
    return torch.bincount(upper, minlength=_NUM_BUCKETS).cpu()


def _lower_counts(chunk: Tensor, bucket: int) -> Tensor:
    keys = _ordered_bits(chunk)
    in_bucket = keys[(keys >> 16) == bucket - _NUM_BUCKETS // 2]
    return torch.bincount(in_bucket & 0xFFFF, minlength=_NUM_BUCKETS).cpu()


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bucket that holds the rank-th smallest, and its rank inside that bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank))
    before = int(cumulative[bucket - 1]) if bucket else 0
    return bucket, rank - before


def _value(bucket: int, low_bits: int) -> float:
    key = torch.tensor(((bucket - _NUM_BUCKETS // 2) << 16) | low_bits, dtype=torch.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return float(bits.view(torch.float32))
