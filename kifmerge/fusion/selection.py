"""Selection over sources: which parameters of a whole model matter, slice by slice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Piece, Range, pieces, read_piece
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.sampling import guess_of_rank
from kifmerge.tensor.fusion import normalise, score_bounds
from kifmerge.tensor.selection import (
    Bracket,
    Scope,
    Threshold,
    compare,
    importance_bracket,
    importance_threshold,
    kth_smallest,
    mask_above,
    threshold_in,
    threshold_rank,
)
from kifmerge.tensor.window import value_near

_Found = TypeVar("_Found")

# Counting has a cost per piece: larger ones than for fusing pay, where they are few at once.
COUNTED_BYTES = 1 << 21
LEAST_COUNTED_BYTES = 1 << 18
# Where few scores are counted, near a guess, smaller ones take no longer, and less memory.
_NEAR_BYTES = 1 << 20
_MOST_COUNTED_BYTES = 1 << 23
_IN_CALLER = Workers(0)


def counted_bytes(num_workers: int) -> int:
    """Of a piece that one of so many workers counts, so that all of them stay within a budget."""
    share = _MOST_COUNTED_BYTES // max(num_workers, 1)
    return max(min(COUNTED_BYTES, share), LEAST_COUNTED_BYTES)


def counting_bytes(num_workers: int) -> int:
    """What so many workers take while they count. Measured: twelve times what they look at."""
    num_workers = max(num_workers, 1)
    return 12 * num_workers * counted_bytes(num_workers)


class ScoreStream:
    """Scores as a re-iterable of functions that read flat pieces: two passes need a piece each.

    Args:
        scores: source of scores.
        names: of some parameters; None takes all.
        num_workers: that count at the same time.
        most_bytes: of a piece on a CPU.
    """

    def __init__(
        self,
        scores: Source,
        names: Sequence[str] | None = None,
        *,
        num_workers: int = 1,
        most_bytes: int = COUNTED_BYTES,
    ) -> None:
        self._scores = scores
        self._names = scores.names() if names is None else names
        self._counted_bytes = min(counted_bytes(num_workers), most_bytes)

    def __iter__(self) -> Iterator[Callable[[], Tensor]]:
        for piece in pieces(self._scores, self._names, most_bytes=self._most_bytes):
            yield partial(read_piece, self._scores.read, piece)

    @property
    def _most_bytes(self) -> int | None:
        on_cpu = all(self._scores.info(name).device.type == "cpu" for name in self._names[:1])
        return self._counted_bytes if on_cpu else None


@dataclass(frozen=True, slots=True)
class Marks:
    """The important parameters of one side, marked while their scores are read.

    Attributes:
        scores: of the parameters.
        thresholds: by parameter; one and the same for all where the scope is global.
        threshold: that one, or None where each tensor has its own.
    """

    scores: Source
    thresholds: Mapping[str, Threshold]
    threshold: float | None

    def show(self, piece: Piece) -> Tensor:
        """Bool for the parameters of a piece: the score exceeds the threshold."""
        if self.threshold is not None:
            return mask_above(read_piece(self.scores.read, piece), self.thresholds[piece[0].name])
        return torch.cat(
            [mask_above(self.scores.read(*part), self.thresholds[part.name]) for part in piece]
        )


def mark_important(
    scores: Source,
    important_fraction: float | str,
    scope: Scope,
    role: str,
    *,
    workers: Workers | None = None,
    ranks: Ranks = ALONE,
    bracket: Bracket | None = None,
) -> Marks:
    """Find the exact thresholds of one side; warns when nothing is important.

    One threshold for all takes one pass where a sample of the scores leads to it, else two; as does
    each of those by tensor.

    Args:
        scores: of all parameters.
        important_fraction: share to be found important.
        scope: one threshold for all parameters, or one per tensor.
        role: what the warning calls the scores: new, historical.
        workers: share the passes.
        ranks: share them too, tensor by tensor.
        bracket: of one threshold for all, where the first pass has been made.

    Raises:
        ValueError: no scores, or NaN among them.
    """
    workers = workers or _IN_CALLER
    thresholds: Mapping[str, Threshold]
    common = None
    if scope == "global":
        names = _share(scores, scores.names(), ranks)
        common = _common_threshold(scores, names, important_fraction, workers, ranks, bracket)
        thresholds = dict.fromkeys(scores.names(), common)
    else:
        names = [name for name in scores.names() if scores.info(name).numel]
        found = _of_each(
            lambda name: astuple(
                importance_threshold(
                    ScoreStream(scores, [name], num_workers=workers.num), important_fraction
                )
            ),
            scores, names, workers, ranks,
        )  # fmt: skip
        thresholds = {name: Threshold(*found[name]) for name in names}
    warn_of_equal(thresholds.values(), important_fraction, role)
    return Marks(scores, thresholds, None if common is None else common.value)


def _common_threshold(
    scores: Source,
    names: Sequence[str],
    important_fraction: float | str,
    workers: Workers,
    ranks: Ranks,
    bracket: Bracket | None,
) -> Threshold:
    """Of all scores together, of which the named ones are this rank's."""
    stream = ScoreStream(scores, names, num_workers=workers.num)
    if bracket is None:
        num_scores = sum(scores.info(name).numel for name in scores.names())
        rank = threshold_rank(num_scores, important_fraction)
        found = _led_by_sample(scores, names, rank, num_scores, workers, ranks)
        if found is not None:
            return found
        bracket = importance_bracket(
            stream, important_fraction, reduce_counts=ranks.sum, spread=workers.map
        )
    return threshold_in(bracket, stream, reduce_counts=ranks.sum, spread=workers.map)


def _led_by_sample(
    scores: Source,
    names: Sequence[str],
    rank: int,
    num_scores: int,
    workers: Workers,
    ranks: Ranks,
) -> Threshold | None:
    """The rank-th smallest of all scores, if a sample leads there."""
    guess = guess_of_rank(scores, names, rank, num_scores, ranks)
    if guess is None:
        return None
    stream = ScoreStream(scores, names, num_workers=workers.num, most_bytes=_NEAR_BYTES)
    return value_near(guess, stream, rank, reduce_counts=ranks.sum, spread=workers.map)


def warn_of_equal(
    thresholds: Iterable[Threshold], important_fraction: float | str, role: str
) -> None:
    """Warn where something was asked for, and nothing is important."""
    if float(important_fraction) > 0 and all(t.is_degenerate for t in thresholds):
        warnings.warn(
            f"the {role} importance scores are all equal: nothing is found important",
            stacklevel=3,
        )


def _share(source: Source, names: Sequence[str], ranks: Ranks) -> list[str]:
    """Names of the tensors that this rank is to go through."""
    return ranks.share(names, lambda name: source.info(name).nbytes)


def _of_each(
    find: Callable[[str], _Found],
    source: Source,
    names: Sequence[str],
    workers: Workers,
    ranks: Ranks,
) -> dict[str, _Found]:
    """What is found of each tensor, by its name, whichever rank looks at it."""
    own = _share(source, names, ranks)
    found = ranks.gather(dict(zip(own, workers.map(find, own), strict=True)))
    return {name: value for of_rank in found for name, value in of_rank.items()}


@dataclass(frozen=True, slots=True)
class LargestMarks:
    """The largest elements of a task vector, marked while they are at hand.

    Attributes:
        smallest_kept: tensor name -> the smallest absolute value that counts as large.
    """

    smallest_kept: Mapping[str, float]

    def show_largest(self, piece: Piece, vector: Tensor) -> Tensor:
        """Bool for the elements of a piece of the task vector."""
        sizes = vector.abs()
        if len(piece) == 1:
            return compare(np.greater_equal, sizes, self.smallest_kept[piece[0].name])
        parts = sizes.split([part.stop - part.start for part in piece])
        return torch.cat(
            [
                compare(np.greater_equal, s, self.smallest_kept[p.name])
                for s, p in zip(parts, piece, strict=True)
            ]
        )


def mark_largest(
    sizes: Source,
    names: Sequence[str],
    density: float,
    scope: Scope,
    workers: Workers,
    ranks: Ranks = ALONE,
) -> LargestMarks:
    """Find above which absolute value lie the ceil(density * n) largest of n elements.

    Elements equal to the smallest of them are kept too, whichever their number.

    Args:
        sizes: absolute values of a task vector.
        names: of its tensors.
        density: share to be kept, in [0, 1]; 0 keeps none.
        scope: of all elements together, or of each tensor.
        workers: share the passes.
        ranks: share them too, tensor by tensor.
    """
    names = [name for name in names if sizes.info(name).numel]
    if density == 0.0:
        return LargestMarks(dict.fromkeys(names, math.inf))
    if scope == "global":
        total = sum(sizes.info(name).numel for name in names)
        rank = _rank_of_density(total, density)
        own = _share(sizes, names, ranks)
        found = _led_by_sample(sizes, own, rank, total, workers, ranks)
        if found is not None:
            return LargestMarks(dict.fromkeys(names, found.value))
        stream = ScoreStream(sizes, own, num_workers=workers.num)
        value = kth_smallest(stream, rank, reduce_counts=ranks.sum, spread=workers.map)
        return LargestMarks(dict.fromkeys(names, value))
    return LargestMarks(
        _of_each(
            lambda name: _smallest_kept(sizes, name, density, workers.num),
            sizes, names, workers, ranks,
        )
    )  # fmt: skip


def _smallest_kept(sizes: Source, name: str, density: float, num_workers: int) -> float:
    numel = sizes.info(name).numel
    rank = _rank_of_density(numel, density)
    if 4 * numel <= COUNTED_BYTES >> 3:
        # Fewer elements than counters: sorting is faster.
        return float(torch.kthvalue(sizes.read(*Range(name, 0, numel)), rank).values)
    return kth_smallest(ScoreStream(sizes, [name], num_workers=num_workers), rank)


def _rank_of_density(numel: int, density: float) -> int:
    return numel - math.ceil(density * numel) + 1


def normalised_scores(scores: Source, ranks: Ranks = ALONE) -> Callable[[Piece], Tensor]:
    """Shows scores min-max normalised over the whole model; one pass to find their bounds."""
    names = _share(scores, scores.names(), ranks)
    found = ranks.gather(score_bounds(read() for read in ScoreStream(scores, names)))
    bounds = min(low for low, _ in found), max(high for _, high in found)
    return lambda piece: normalise(read_piece(scores.read, piece), bounds)
