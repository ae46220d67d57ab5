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
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from kifmerge.tensor import buckets
from kifmerge.tensor.native import NUM_BUCKETS

Scope = Literal["global", "tensor"]
CountReduction = Callable[[Tensor], Tensor]
# Scores, or a function that reads them: readings are spread over workers together with the counts.
Part = Tensor | Callable[[], Tensor]
_Found = TypeVar("_Found")


class Spread(Protocol):
    """Applies a function to many parts, as the built-in ``map`` does, or on threads."""

    def __call__(
        self, function: Callable[[Part], _Found], parts: Iterable[Part], /
    ) -> Iterable[_Found]:
        """Give what the function gives of each part, in their order."""
        ...


CHUNK_NUMEL = 1 << 20
ACCELERATOR_CHUNK_NUMEL = 1 << 25
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
    bracket = importance_bracket(
        scores, important_fraction, reduce_counts=reduce_counts, spread=spread
    )
    return threshold_in(bracket, scores, reduce_counts=reduce_counts, spread=spread)


@dataclass(frozen=True, slots=True)
class Bracket:
    """The upper 16 bits of a threshold: what one pass over the scores finds.

    Attributes:
        bucket: what these bits are, in the order of values.
        rank: of the threshold among the scores in the bracket, 1 for the smallest.
        num_scores: how many scores there are.
        num_within: how many of them are in the bracket.
        num_above: how many are beyond it.
        is_exact: no score has more than these bits: all in the bracket are equal.
    """

    bucket: int
    rank: int
    num_scores: int
    num_within: int
    num_above: int
    is_exact: bool

    def above(self, scores: Tensor) -> Tensor:
        """Bool mask of the scores beyond the bracket."""
        return compare(np.greater_equal, scores, buckets.value_at(self.bucket + 1, 0))

    def threshold(self, low_counts: Tensor) -> Threshold:
        """The threshold itself.

        Args:
            low_counts: how many scores in the bracket have which lower bits.
        """
        low, _ = _locate(low_counts, self.rank)
        num_above = self.num_above + int(low_counts[low + 1 :].sum())
        return Threshold(buckets.value_at(self.bucket, low), self.num_scores, num_above)


def importance_bracket(
    scores: Iterable[Part],
    important_fraction: float | str | Fraction,
    *,
    reduce_counts: CountReduction | None = None,
    spread: Spread = map,
) -> Bracket:
    """What one pass tells of :func:`importance_threshold`, which takes the same arguments."""
    return _bracket(
        scores, lambda num: threshold_rank(num, important_fraction), reduce_counts, spread
    )


def threshold_in(
    bracket: Bracket,
    scores: Iterable[Part],
    *,
    reduce_counts: CountReduction | None = None,
    spread: Spread = map,
) -> Threshold:
    """The threshold that a bracket of these scores holds; a second pass, where one is needed."""
    return bracket.threshold(_lower_counts(scores, bracket, reduce_counts, spread))


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

    def checked(num_values: int) -> int:
        if not 1 <= rank <= num_values:
            raise ValueError(f"rank must lie in 1..{num_values}, found {rank}")
        return rank

    bracket = _bracket(scores, checked, reduce_counts, spread)
    return threshold_in(bracket, scores, reduce_counts=reduce_counts, spread=spread).value


def _count(
    scores: Iterable[Part],
    add_counts: Callable[[Tensor, Tensor], None],
    num_counts: int,
    reduce_counts: CountReduction | None,
    spread: Spread,
) -> Tensor:
    """Count all chunks, each thread and device by its own counters, and add these up on the CPU."""
    if isinstance(scores, Iterator):
        raise TypeError("scores are read twice: pass a list or a re-iterable, not an iterator")
    counters: dict[tuple[int, torch.device], Tensor] = {}

    def count_part(part: Part) -> None:
        scores = part if isinstance(part, Tensor) else part()
        place = threading.get_ident(), scores.device
        if place not in counters:
            counters[place] = torch.zeros(num_counts, dtype=torch.int64, device=scores.device)
        for chunk in scores.detach().reshape(-1).split(_chunk_numel(scores)):
            add_counts(_countable(chunk), counters[place])

    for _ in spread(count_part, _bundles(scores)):
        pass
    # A process may have no scores, and adds up with the others all the same.
    total = torch.zeros(num_counts, dtype=torch.int64)
    for counts in counters.values():
        total += counts.cpu()
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


def _add_upper_counts(chunk: Tensor, counts: Tensor) -> None:
    """Add per bucket, and behind them the number of NaN and of values of more than 16 bits."""
    num_nan = buckets.count_buckets(chunk, counts[:-2])
    if isinstance(num_nan, Tensor) or num_nan:
        counts[-2] += num_nan
    if chunk.dtype != torch.bfloat16:
        counts[-1] += chunk.numel()


def _bracket(
    scores: Iterable[Part],
    rank_of: Callable[[int], int],
    reduce_counts: CountReduction | None,
    spread: Spread,
) -> Bracket:
    """The bracket of the value of some rank, which follows from the number of values."""
    counts = _count(scores, _add_upper_counts, NUM_BUCKETS + 2, reduce_counts, spread)
    upper, (num_nan, num_longer) = counts[:-2], counts[-2:].tolist()
    if num_nan:
        raise ValueError("NaN among the scores")
    num_scores = int(upper.sum())
    bucket, rank = _locate(upper, rank_of(num_scores))
    num_above = int(upper[bucket + 1 :].sum())
    return Bracket(bucket, rank, num_scores, int(upper[bucket]), num_above, num_longer == 0)


def _lower_counts(
    scores: Iterable[Part],
    bracket: Bracket,
    reduce_counts: CountReduction | None,
    spread: Spread,
) -> Tensor:
    """How many scores in a bracket have which lower bits: a second pass, where there are any."""
    if bracket.is_exact:
        only = torch.zeros(NUM_BUCKETS, dtype=torch.int64)
        only[0 if bracket.bucket >= buckets.ZERO_BUCKET else -1] = bracket.num_within
        return only
    return _count(
        scores,
        lambda chunk, counts: buckets.add_low_counts(chunk, bracket.bucket, counts),
        NUM_BUCKETS,
        reduce_counts,
        spread,
    )


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bucket that holds the rank-th smallest, and its rank inside that bucket."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, rank))
    before = int(cumulative[bucket - 1]) if bucket else 0
    return bucket, rank - before
