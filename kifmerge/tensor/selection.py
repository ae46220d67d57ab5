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
ACCELERATOR_CHUNK_NUMEL = 1 << 25
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
    upper = _checked_upper_counts(scores, reduce_counts)
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
    upper = _checked_upper_counts(scores, None)
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
    """Add up the counts of all chunks, where the chunks are, and bring the sum to the CPU."""
    if isinstance(tensors, Iterator):
        raise TypeError("scores are read twice: pass a list or a re-iterable, not an iterator")
    total: Tensor | None = None
    for chunk in _chunks(tensors):
        counts = counts_of(chunk)
        total = counts if total is None else total.to(counts.device).add_(counts)
    if total is None:
        total = torch.zeros(_NUM_BUCKETS + 1, dtype=torch.int64)
    total = total.cpu()
    return total if reduce_counts is None else reduce_counts(total)


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut large tensors and pack small ones into flat chunks of about the same size."""
    packed: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype not in _SUPPORTED:
            raise TypeError(f"scores must be float32, bfloat16 or float16, found {tensor.dtype}")
        limit = CHUNK_NUMEL if tensor.device.type == "cpu" else ACCELERATOR_CHUNK_NUMEL
        for piece in tensor.detach().reshape(-1).split(limit):
            full = sum(earlier.numel() for earlier in packed) + piece.numel() > limit
            if packed and (full or packed[0].device != piece.device):
                yield torch.cat(packed) if len(packed) > 1 else packed[0]
                packed = []
            packed.append(piece)
    if packed:
        yield torch.cat(packed) if len(packed) > 1 else packed[0]


def _ordered_bits(chunk: Tensor) -> Tensor:
    """int32 keys that order as the float32 values do, with -0.0 equal to 0.0."""
    bits = (chunk.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper_counts(chunk: Tensor) -> Tensor:
    """Counts per bucket, and behind them the number of NaN."""
    upper = (_ordered_bits(chunk) >> 16) + (_NUM_BUCKETS // 2)
    counts = torch.bincount(upper, minlength=_NUM_BUCKETS + 1)
    counts[_NUM_BUCKETS] = chunk.isnan().sum()
    return counts


def _checked_upper_counts(scores: Iterable[Tensor], reduce_counts: CountReduction | None) -> Tensor:
    counts = _count(scores, _upper_counts, reduce_counts)
    if int(counts[_NUM_BUCKETS]):
        raise ValueError("NaN among the scores")
    return counts[:_NUM_BUCKETS]


def _lower_counts(chunk: Tensor, bucket: int) -> Tensor:
    keys = _ordered_bits(chunk)
    in_bucket = keys[(keys >> 16) == bucket - _NUM_BUCKETS // 2]
    return torch.bincount(in_bucket & 0xFFFF, minlength=_NUM_BUCKETS)


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
