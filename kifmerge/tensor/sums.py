"""Rules that add weighted differences up, described: what the compiled part makes in one pass.

Each description stands for a function of :mod:`kifmerge.tensor.fusion` or
:mod:`kifmerge.tensor.baselines`, operation by operation, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kifmerge.tensor.baselines import pivot_and_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSum:
    """origin + w_1 * (x_1 - y_1) + w_2 * (x_2 - y_2) + ..., in float32, rounded at each operation.

    Attributes:
        pairs: of each term, which of the tensors are x and y.
        weights: of each term; one number, or a float32 tensor of 2 ** N numbers: those of
            :func:`kifmerge.tensor.mask_weights.by_code` for N masks.
        origin: which of the tensors it is.
        origin_last: it is added after all terms.
    """

    pairs: Sequence[tuple[int, int]]
    weights: Sequence[float] | Tensor
    origin: int = 0
    origin_last: bool = False


def sum_of_vectors(
    weights: Sequence[float] | Tensor, starts: Sequence[int], *, origin_last: bool = False
) -> WeightedSum:
    """Of task vectors; the first of the tensors is the base, the others are the models.

    Args:
        weights: of the models.
        starts: of each model, where its task vector starts: 0 for the base, i for the i-th model.
        origin_last: the base is added after all terms, as in task arithmetic.

    >>> sum_of_vectors([0.5, 0.5], [0, 1]).pairs
    [(1, 0), (2, 1)]
    """
    pairs = [(model, start) for model, start in enumerate(starts, start=1)]
    return WeightedSum(pairs=pairs, weights=weights, origin_last=origin_last)


def mean_of_models(weights: Sequence[float]) -> WeightedSum:
    """The weighted mean of :func:`kifmerge.tensor.baselines.linear`; the tensors are the models.

    >>> mean_of_models([1.0, 3.0])
    WeightedSum(pairs=[(0, 1)], weights=[0.25], origin=1, origin_last=True)
    """
    pivot, shares = pivot_and_shares(weights)
    others = [index for index in range(len(shares)) if index != pivot]
    return WeightedSum(
        pairs=[(index, pivot) for index in others],
        weights=[shares[index] for index in others],
        origin=pivot,
        origin_last=bool(others),
    )
