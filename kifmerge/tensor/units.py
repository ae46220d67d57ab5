"""Skill units: the parts of a model that share one score, and the means that give it.

A unit is a whole tensor, all tensors of a layer, or rank r of an adapted module: row r of its
lora_A with column r of its lora_B. The score of a unit is the mean importance of its members (of a
rank, the mean over the row times the mean over the column). Over the units of a model scores are
min-max normalised, and a unit is important when it exceeds a percentile; the scores of successive
tasks add up to a cumulative one.

References:
    KIF, arXiv 2408.05200, with the weights and the percentile of the authors' released code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

UnitKind = Literal["tensor", "lora-rank", "layer"]
ReadElements = Callable[[int, int], Tensor]

DEFAULT_IMPORTANT_FRACTION = 0.2
DEFAULT_NEW_WEIGHT = 0.3
DEFAULT_CUMULATIVE_WEIGHT = 0.7

# Measured: as float64 a block stays in cache, and folding it costs about a nanosecond an element.
BLOCK_NUMEL = 1 << 17

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:"
    r"(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight|"
    r"embedding_(?P<embedding_side>[AB])(?:\.(?P<embedding_adapter>[^.]+))?)"
)


def normalise_scores(scores: Sequence[float]) -> list[float]:
    """Min-max normalisation over units to [0, 1]; constant scores become 0.

    Raises:
        ValueError: a score is not finite, or they lie too far apart for a float.

    >>> normalise_scores([1.0, 2.0, 5.0]), normalise_scores([3.0, 3.0])
    ([0.0, 0.25, 1.0], [0.0, 0.0])
    """
    if not scores:
        return []
    strange = next((score for score in scores if not math.isfinite(score)), None)
    if strange is not None:
        raise ValueError(f"a unit's score is {strange}")
    smallest, largest = min(scores), max(scores)
    extent = largest - smallest
    if not math.isfinite(extent):
        raise ValueError(f"the units' scores lie too far apart: {smallest} to {largest}")
    if extent == 0.0:
        return [0.0] * len(scores)
    return [(score - smallest) / extent for score in scores]


def important_units(
    scores: Sequence[float], important_fraction: float | str = DEFAULT_IMPORTANT_FRACTION
) -> list[bool]:
    """Which units are important: normalised, above the (1 - fraction) percentile of all.

    The percentile interpolates linearly between two scores, as numpy's does; a score must be
    strictly greater. Constant scores make no unit important.

    Args:
        scores: of all units.
        important_fraction: about the share found important, in [0, 1].

    Raises:
        ValueError: a fraction outside [0, 1], or a score that is not finite.

    >>> important_units([1.0, 2.0, 3.0, 4.0, 9.0])
    [False, False, False, False, True]
    """
    fraction = Fraction(str(important_fraction))
    if not 0 <= fraction <= 1:
        raise ValueError(f"important fraction must lie in [0, 1], found {important_fraction}")
    normalised = normalise_scores(scores)
    if not normalised:
        return []
    threshold = _quantile(normalised, float(1 - fraction))
    return [score > threshold for score in normalised]


def _quantile(values: Sequence[float], q: float) -> float:
    """Rounded step by step as ``numpy.quantile`` does, so that ties with the threshold agree."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q
    below = min(math.floor(position), len(ordered) - 1)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    share = position - below
    if share >= 0.5:
        return high - (high - low) * (1.0 - share)
    return low + (high - low) * share


def cumulative_scores(
    new: Sequence[float],
    cumulative_before: Sequence[float] | None,
    *,
    new_weight: float = DEFAULT_NEW_WEIGHT,
    cumulative_weight: float = DEFAULT_CUMULATIVE_WEIGHT,
) -> list[float]:
    """How important each unit is to all tasks so far, the new one included.

    ``minmax(new_weight * minmax(new) + cumulative_weight * minmax(cumulative_before))``; after the
    first task its own scores as they are.

    Args:
        new: scores of the new task, one per unit.
        cumulative_before: cumulative scores after the task before, likewise; None if there is none.
        new_weight: share of the new task.
        cumulative_weight: share of all before it.

    Raises:
        ValueError: not as many scores before as now, or one that is not finite.

    >>> cumulative_scores([5.0, 7.0], None)
    [5.0, 7.0]
    >>> cumulative_scores([0.0, 2.0], [8.0, 4.0])
    [1.0, 0.0]
    """
    if cumulative_before is None:
        return list(new)
    if len(new) != len(cumulative_before):
        raise ValueError(
            f"expected as many cumulative scores as new ones, {len(new)}, "
            f"found {len(cumulative_before)}"
        )
    pairs = zip(normalise_scores(new), normalise_scores(cumulative_before), strict=True)
    return normalise_scores([new_weight * n + cumulative_weight * c for n, c in pairs])


class LoraFactor(NamedTuple):
    """What the name of a LoRA factor says.

    Attributes:
        module: the adapted module, with the adapter's name where there is one.
        side: ``A``, whose rows are the ranks, or ``B``, whose columns are.
    """

    module: str
    side: Literal["A", "B"]


def lora_factor(name: str) -> LoraFactor | None:
    """The factor that a tensor is, by its name; None if it is none.

    In peft's files and in its live models, embeddings included; a factor's bias is none.

    >>> lora_factor("base_model.model.v_proj.lora_A.weight")
    LoraFactor(module='base_model.model.v_proj', side='A')
    >>> lora_factor("model.wte.lora_embedding_B.default")
    LoraFactor(module='model.wte.default', side='B')
    >>> lora_factor("model.v_proj.lora_B.bias"), lora_factor("model.v_proj.weight")
    (None, None)
    """
    found = _FACTOR.fullmatch(name)
    if found is None:
        return None
    side: Literal["A", "B"] = "A" if "A" in (found["side"], found["embedding_side"]) else "B"
    adapter = found["adapter"] or found["embedding_adapter"]
    return LoraFactor(f"{found['module']}.{adapter}" if adapter else found["module"], side)


def slice_layout(shape: Sequence[int], axis: int | None) -> tuple[int, int, int]:
    """(outer, slices, inner) sizes of a row-major tensor cut into slices along an axis.

    Element e lies in slice ``e // inner % slices``. Without an axis all of it is one slice.

    >>> slice_layout((8, 32), 0), slice_layout((48, 8), 1), slice_layout((48, 8), None)
    ((1, 8, 32), (48, 8, 1), (1, 1, 384))
    """
    if axis is None:
        return 1, 1, math.prod(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def slice_sums(read: ReadElements, shape: Sequence[int], axis: int | None) -> list[float]:
    """Sum of the elements of each slice of a tensor, in float64 and in one order of additions.

    Elements are read in blocks that depend on the shape alone, a block is folded in halves, and
    blocks add up one after another: no sum depends on how the tensor is stored, on threads, on the
    device or on the processor. Memory is that of a block.

    Args:
        read: gives elements ``start`` to ``stop`` of the row-major tensor, in one dimension.
        shape: of the tensor.
        axis: whose indices the slices are; None takes the whole tensor as one.

    >>> values = torch.arange(6.0)
    >>> slice_sums(lambda start, stop: values[start:stop], (2, 3), 1)
    [3.0, 5.0, 7.0]
    >>> slice_sums(lambda start, stop: values[start:stop], (2, 3), None)
    [15.0]
    """
    outer, num_slices, inner = slice_layout(shape, axis)
    sums = torch.zeros(num_slices, dtype=torch.float64)
    for block in _blocks(outer, num_slices, inner):
        values = read(block.start, block.start + math.prod(block.view)).detach()
        # A copy, since it is folded in place; on the CPU, since not every device knows float64.
        folded = values.cpu().to(torch.float64, copy=True).view(block.view)
        part = _fold(_fold(folded, 0), 2).view(-1)
        sums[block.first : block.first + len(part)] += part
    return sums.tolist()


class _Block(NamedTuple):
    """Elements that are read at once: where they start, (outer, slices, inner), first slice."""

    start: int
    view: tuple[int, int, int]
    first: int


def _blocks(outer: int, num_slices: int, inner: int) -> Iterator[_Block]:
    """Cut a tensor into blocks of at most BLOCK_NUMEL elements, by its shape alone."""
    row = num_slices * inner
    if not outer * row:
        return
    if row <= BLOCK_NUMEL:
        step = BLOCK_NUMEL // row
        for start in range(0, outer, step):
            yield _Block(start * row, (min(step, outer - start), num_slices, inner), 0)
    elif inner <= BLOCK_NUMEL:
        step = BLOCK_NUMEL // inner
        for row_start in range(0, outer * row, row):
            for first in range(0, num_slices, step):
                view = (1, min(step, num_slices - first), inner)
                yield _Block(row_start + first * inner, view, first)
    else:
        for number in range(outer * num_slices):
            for start in range(0, inner, BLOCK_NUMEL):
                view = (1, 1, min(BLOCK_NUMEL, inner - start))
                yield _Block(number * inner + start, view, number % num_slices)


def _fold(values: Tensor, dim: int) -> Tensor:
    """Sum along a dimension, kept with size 1, by adding one half to the other; in place."""
    size = values.shape[dim]
    while size > 1:
        half = size // 2
        if size % 2:
            values.narrow(dim, 0, 1).add_(values.narrow(dim, size - 1, 1))
        values.narrow(dim, 0, half).add_(values.narrow(dim, half, half))
        size = half
    return values.narrow(dim, 0, 1)
