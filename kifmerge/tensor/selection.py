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
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

Scope = Literal["global", "tensor"]
CountReduction = Callable[[Tensor], Tensor]
# Scores, or a function that reads them: readings are spread over workers together with the counts.
Part = Tensor | Callable[[], Tensor]
Spread = Callable[[Callable[[Part], Tensor], Iterable[Part]], Iterable[Tensor]]

CHUNK_NUMEL = 1 << 20
ACCELERATOR_CHUNK_NUMEL = 1 << 25
_NUM_BUCKETS = 1 << 16
_ZERO_BUCKET = _NUM_BUCKETS // 2
# Infinity and NaN are in the buckets from the one on, and before the other.
_MOST_FINITE = _ZERO_BUCKET + 0x7F80
_LEAST_FINITE = _ZERO_BUCKET - 0x7F80
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
    scores: Iterable[Part],
    important_fraction: float | str | Fraction,
    *,
    reduce_counts: CountReduction | None = None,
    spread: Spread = map,
) -> Threshold:
    """Exact threshold over all the given score tensors together.

    Args:
        scores: score tensors of any shape, float32, bfloat16 or float16, or functions that read
            them; iterated at most twice, so pass a list or an object whose ``__iter__`` starts
            anew, not a generator.
        important_fraction: share of scores to be found important, in [0, 1].
        reduce_counts: adds up int64 counts over processes; None for one process.
        spread: applies a function to many parts, as the built-in ``map`` does, or on threads.

    Raises:
        ValueError: no scores, NaN among them, or a fraction outside [0, 1].
        TypeError: another dtype, or an iterable that cannot be iterated twice.

    >>> importance_threshold([torch.arange(6.0), torch.arange(6.0, 11.0)], 0.2)
    Threshold(value=8.0, num_scores=11, num_above=2)
    """
    counts = _two_level_counts(scores, reduce_counts, spread)
    num_scores = int(counts.upper.sum())
    rank = threshold_rank(num_scores, important_fraction)
    bucket, rank_in_bucket = _locate(counts.upper, rank)
    lower = counts.lower(bucket)
    low_bits, _ = _locate(lower, rank_in_bucket)
    num_above = int(counts.upper[bucket + 1 :].sum()) + int(lower[low_bits + 1 :].sum())
    return Threshold(_value(bucket, low_bits), num_scores, num_above)


def mask_above(scores: Tensor, threshold: Threshold) -> Tensor:
    """Bool mask of the scores that exceed the threshold, compared in float32 whatever their dtype.

    >>> mask_above(torch.tensor([1.0, 2.0, 3.0]), Threshold(2.0, 3, 1))
    tensor([False, False,  True])
    """
    return compare(np.greater, scores, threshold.value)


def compare(operator: np.ufunc, values: Tensor, bound: float) -> Tensor:
    """Compare each value, in float32, with a bound: ``numpy.greater``, ``numpy.greater_equal``.

    >>> compare(np.greater_equal, torch.tensor([1.0, 2.0]), 2.0)
    tensor([False,  True])
    """
    if values.device.type == "cpu":  # measured: seven times as fast as torch is there
        return torch.from_numpy(operator(values.detach().float().numpy(), np.float32(bound)))
    return cast(Tensor, getattr(torch, operator.__name__)(values.float(), bound))


def kth_smallest(
    scores: Iterable[Part],
    rank: int,
    *,
    reduce_counts: CountReduction | None = None,
    spread: Spread = map,
) -> float:
    """The rank-th smallest of all values, 1 for the smallest; -0.0 and 0.0 are one value.

    >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([2.0])], 2)
    2.0

    Raises:
        ValueError: rank outside 1..n, or NaN among the values.
    """
    counts = _two_level_counts(scores, reduce_counts, spread)
    num_values = int(counts.upper.sum())
    if not 1 <= rank <= num_values:
        raise ValueError(f"rank must lie in 1..{num_values}, found {rank}")
    bucket, rank_in_bucket = _locate(counts.upper, rank)
    return _value(bucket, _locate(counts.lower(bucket), rank_in_bucket)[0])


def _count(
    scores: Iterable[Part],
    counts_of: Callable[[Tensor], Tensor],
    reduce_counts: CountReduction | None,
    spread: Spread,
) -> Tensor:
    """Add up the counts of all chunks, where the chunks are, and bring the sum to the CPU."""
    if isinstance(scores, Iterator):
        raise TypeError("scores are read twice: pass a list or a re-iterable, not an iterator")

    def counts_of_part(part: Part) -> Tensor:
        scores = part if isinstance(part, Tensor) else part()
        chunks = scores.detach().reshape(-1).split(_chunk_numel(scores))
        total = counts_of(_countable(chunks[0]))
        for chunk in chunks[1:]:
            total += counts_of(_countable(chunk))
        return total

    total: Tensor | None = None
    for counts in spread(counts_of_part, _bundles(scores)):
        total = counts if total is None else total.to(counts.device).add_(counts)
    if total is None:
        total = torch.zeros(_NUM_BUCKETS + 2, dtype=torch.int64)
    total = total.cpu()
    return total if reduce_counts is None else reduce_counts(total)


def _countable(scores: Tensor) -> Tensor:
    if scores.dtype not in _SUPPORTED:
        raise TypeError(f"scores must be float32, bfloat16 or float16, found {scores.dtype}")
    return scores


def _chunk_numel(scores: Tensor) -> int:
    return CHUNK_NUMEL if scores.device.type == "cpu" else ACCELERATOR_CHUNK_NUMEL


def _bundles(scores: Iterable[Part]) -> Iterator[Part]:
    """Pack small tensors into flat ones of about a chunk's size; functions pass as they are."""
    packed: list[Tensor] = []
    for part in scores:
        if not isinstance(part, Tensor):
            yield part
            continue
        flat = _countable(part).detach().reshape(-1)
        full = sum(earlier.numel() for earlier in packed) + flat.numel() > _chunk_numel(flat)
        if packed and (full or packed[0].device != flat.device):
            yield torch.cat(packed) if len(packed) > 1 else packed[0]
            packed = []
        packed.append(flat)
    if packed:
        yield torch.cat(packed) if len(packed) > 1 else packed[0]


def _ordered_bits(chunk: Tensor) -> Tensor:
    """int32 keys that order as the float32 values do, with -0.0 equal to 0.0."""
    bits = (chunk.float() + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def _upper_counts(chunk: Tensor) -> Tensor:
    """Counts per bucket, and behind them the number of NaN and of values of more than 16 bits."""
    counts = _upper_counts_of_positive(chunk) if chunk.device.type == "cpu" else None
    if counts is None:
        upper = (_ordered_bits(chunk) >> 16).add_(_ZERO_BUCKET)
        counts = torch.bincount(upper, minlength=_NUM_BUCKETS + 2)
    # An accelerator would wait for the answer; on a CPU it spares another look at the scores.
    if chunk.device.type != "cpu" or counts[:_LEAST_FINITE].any() or counts[_MOST_FINITE:].any():
        counts[_NUM_BUCKETS] = chunk.isnan().sum()
    counts[_NUM_BUCKETS + 1] = 0 if chunk.dtype == torch.bfloat16 else chunk.numel()
    return counts


def _upper_counts_of_positive(chunk: Tensor) -> Tensor | None:
    """The same in half the time, where no value has a sign, -0.0 included: bits are in order."""
    if chunk.dtype == torch.bfloat16:
        upper = chunk.contiguous().view(torch.int16)
    else:
        upper = chunk.float().contiguous().view(torch.int32) >> 16
    if not upper.numel() or int(upper.amin()) < 0:
        return None
    counts = torch.zeros(_NUM_BUCKETS + 2, dtype=torch.int64)
    counts[_ZERO_BUCKET:_NUM_BUCKETS] = torch.bincount(upper, minlength=_ZERO_BUCKET)
    return counts


@dataclass(frozen=True, slots=True)
class _TwoLevelCounts:
    """Counts per bucket, and on demand those inside one."""

    upper: Tensor
    lower: Callable[[int], Tensor]


def _two_level_counts(
    scores: Iterable[Part], reduce_counts: CountReduction | None, spread: Spread
) -> _TwoLevelCounts:
    counts = _count(scores, _upper_counts, reduce_counts, spread)
    upper = counts[:_NUM_BUCKETS]
    if int(counts[_NUM_BUCKETS]):
        raise ValueError("NaN among the scores")

    def lower(bucket: int) -> Tensor:
        if int(counts[_NUM_BUCKETS + 1]):
            return _count(scores, lambda c: _lower_counts(c, bucket), reduce_counts, spread)
        # bfloat16 throughout: a bucket has one value, and no second pass is needed to find it.
        only = torch.zeros(_NUM_BUCKETS, dtype=torch.int64)
        only[0 if bucket >= _ZERO_BUCKET else -1] = upper[bucket]
        return only

    return _TwoLevelCounts(upper, lower)


def _lower_counts(chunk: Tensor, bucket: int) -> Tensor:
    if chunk.device.type == "cpu" and bucket > _ZERO_BUCKET:
        # Values without a sign, whose bits are in order: measured, a fifth of the time.
        bits = chunk.float().contiguous().numpy().view(np.uint32)
        low = bits - np.uint32((bucket - _ZERO_BUCKET) << 16)
        low = low[np.flatnonzero(low < 1 << 16)]
        return torch.bincount(torch.from_numpy(low.view(np.int32)), minlength=_NUM_BUCKETS)
    keys = _ordered_bits(chunk)
    in_bucket = keys[(keys >> 16) == bucket - _ZERO_BUCKET]
    return torch.bincount(in_bucket & 0xFFFF, minlength=_NUM_BUCKETS)


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bucket that holds the rank-th smallest, and its rank inside that bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank))
    before = int(cumulative[bucket - 1]) if bucket else 0
    return bucket, rank - before


def _value(bucket: int, low_bits: int) -> float:
    key = torch.tensor(((bucket - _ZERO_BUCKET) << 16) | low_bits, dtype=torch.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return float(bits.view(torch.float32))
