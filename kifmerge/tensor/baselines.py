"""Baselines: rules of the field that know no importance, the measure of those that do.

All rules work element by element, compute in float32 and return the dtype of ``base`` or, where
there is none, of the first model. Task vectors are ``model - base``. Values are taken to be finite.
As in :mod:`kifmerge.tensor.fusion`, bits do not depend on how tensors are cut.

Where these differ from mergekit (0.1.4) on the same float32 input: ``linear`` works on differences,
which rounds less; ``ties`` leaves trimming to its caller and divides by the sizes of negative
weights; ``task_arithmetic`` multiplies its scale into the weights. With a scale of 1 the latter,
and with positive weights ``ties``, give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kifmerge.tensor.mask_weights import indicator


def linear(models: Sequence[Tensor], weights: Sequence[float], *, normalise: bool = True) -> Tensor:
    """Weighted mean of models: ``sum of w_i * m_i / sum of w_i``.

    Computed as ``m_p + sum over i of w_i / W * (m_i - m_p)`` with W the sum of the weights and p
    the model of the largest one. Differences between models of one base are small and often exact,
    so that little more is rounded than the result; equal models give just what they are.

    Args:
        models: one tensor per model, of one shape.
        weights: one finite number per model; may be negative.
        normalise: divide by the sum of the weights; without it this is the plain weighted sum.

    Raises:
        ValueError: no models, not one weight for each, weights that are not finite, or weights
            that add up to 0 where they are to be normalised.

    References:
        Model soups, arXiv 2203.05482 (equal weights).

    >>> linear([torch.tensor([1.0]), torch.tensor([5.0])], [3.0, 1.0])
    tensor([2.])
    """
    _check_weights(models, weights)
    dtype = models[0].dtype
    if not normalise:
        return _weighted_sum(models, weights).to(dtype)
    pivot, shares = pivot_and_shares(weights)
    origin = models[pivot].float()
    result: Tensor | None = None
    for index, (model, share) in enumerate(zip(models, shares, strict=True)):
        if index != pivot:
            term = (model.float() - origin).mul_(share)
            result = term if result is None else result.add_(term)
    return (origin.clone() if result is None else result.add_(origin)).to(dtype)


def pivot_and_shares(weights: Sequence[float]) -> tuple[int, list[float]]:
    """Which weight is the largest, and each of them divided by their sum.

    Raises:
        ValueError: weights that add up to 0.

    >>> pivot_and_shares([1.0, 3.0])
    (1, [0.25, 0.75])
    """
    total = math.fsum(weights)
    if total == 0.0:
        raise ValueError(f"weights that add up to 0 cannot be normalised: {list(weights)}")
    shares = [weight / total for weight in weights]
    return max(range(len(shares)), key=lambda index: abs(shares[index])), shares


def task_arithmetic(
    base: Tensor, vectors: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0
) -> Tensor:
    """Task arithmetic: ``base + scale * (w_1 * v_1 + w_2 * v_2 + ...)``.

    The scale is multiplied into the weights beforehand.

    Args:
        base: weights that all task vectors start from.
        vectors: one task vector per model, of the base's shape.
        weights: one finite number per model; a negative one forgets. They are not normalised.
        scale: lambda, of the whole sum.

    Raises:
        ValueError: no models, not one weight for each, or weights that are not finite.

    References:
        Task arithmetic, arXiv 2212.04089, where all weights are 1.

    >>> vectors = [torch.tensor([1.0]), torch.tensor([2.0])]
    >>> task_arithmetic(torch.ones(1), vectors, [1.0, -1.0], scale=0.5)
    tensor([0.5000])
    """
    _check_weights(vectors, weights)
    update = _weighted_sum(vectors, [scale * weight for weight in weights])
    return update.add_(base.float()).to(base.dtype)


def ties(
    base: Tensor,
    vectors: Sequence[Tensor],
    kept: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
) -> Tensor:
    """TIES, after trimming: elect a sign for each element, then average those that agree with it.

    With ``t_i = w_i * v_i`` where kept and 0 elsewhere: the elected sign is that of the sum of t_i,
    and ``A`` the models whose t_i has this sign. The result is ``base + scale * (sum over A of
    t_i) / (sum over A of |w_i|)``, and the base where A is empty.

    Args:
        base: weights that all task vectors start from.
        vectors: one task vector per model, of the base's shape.
        kept: one bool mask per model: what survived trimming. Over which elements the largest are
            chosen, all of a model or a tensor's, and how many, is for the caller to say.
        weights: one finite number per model.
        scale: lambda, of the merged task vector.

    Raises:
        ValueError: no models, not one weight and mask for each, or weights that are not finite.

    References:
        TIES-Merging, arXiv 2306.01708. Deviations: the paper has no weights; here, as in mergekit,
        they count in the election and in the mean. A sum of exactly 0 elects plus, as in mergekit;
        the authors' code takes the sign that prevails in the whole model. A negative weight makes
        the model vote for, and add, its reversed vector; mergekit divides by the signed sum, which
        turns the vector of a model that is alone back again and may be 0.

    >>> yes, no = torch.tensor([True]), torch.tensor([False])
    >>> vectors = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([1.0])]
    >>> ties(torch.zeros(1), vectors, [yes, yes, yes], [1.0, 1.0, 1.0])
    tensor([2.])
    >>> ties(torch.zeros(1), vectors, [no, yes, no], [1.0, 1.0, 1.0])
    tensor([-1.])
    """
    _check_weights(vectors, weights)
    terms = [
        _times(indicator(mask).mul_(vector.float()), weight)
        for vector, mask, weight in zip(vectors, kept, weights, strict=True)
    ]
    sign = _add_up([terms[0].clone(), *terms[1:]])
    sign.sign_().add_(0.5).sign_()  # 0 becomes 1; a comparison would take many times as long
    agreeing = [term.mul_(sign).relu_() for term in terms]
    update = _add_up(
        [torch.add(agreeing[0], 0.0), *agreeing[1:]]
    )  # 0.0 is added so that none is -0.0
    votes = zip(agreeing, weights, strict=True)
    divisor = _add_up([_times(one.sign_(), abs(weight)) for one, weight in votes])
    smallest = min((abs(weight) for weight in weights if weight), default=1.0)
    update.div_(divisor.clamp_(min=smallest)).mul_(sign)  # where nobody agrees: 0 by anything
    return _times(update, scale).add_(base.float()).to(base.dtype)


def magmax(base: Tensor, vectors: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """MagMax: ``base + scale * v`` with v the task vector of the largest magnitude there.

    Args:
        base: weights that all task vectors start from.
        vectors: one task vector per model, of the base's shape.
        scale: lambda, of the merged task vector.

    Raises:
        ValueError: no models.

    References:
        MagMax, arXiv 2407.06322. Of equal magnitudes the first model's is taken; the authors' code
        takes the last.

    >>> vectors = [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 2.0])]
    >>> magmax(torch.zeros(2), vectors)
    tensor([-3., -2.])
    """
    if not vectors:
        raise ValueError("expected at least one task vector, found none")
    largest = vectors[0].float().clone()
    for vector in vectors[1:]:
        values = vector.float()
        # 1 where the magnitude exceeds that of all before, 0 elsewhere.
        exceeds = values.abs().sub_(largest.abs()).sign_().relu_()
        largest.mul_(1.0 - exceeds).add_(exceeds.mul_(values))
    return _times(largest, scale).add_(base.float()).to(base.dtype)


def _add_up(terms: Sequence[Tensor]) -> Tensor:
    """t_1 + t_2 + ..., in this order and into the first of them."""
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total


def _times(values: Tensor, factor: float) -> Tensor:
    """Values times a factor, in place; a factor of 1 costs nothing."""
    return values if factor == 1.0 else values.mul_(factor)


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """w_1 * x_1 + w_2 * x_2 + ..., in this order and in float32."""
    total = values[0].float() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value.float() * weight)
    return total


def _check_weights(values: Sequence[Tensor], weights: Sequence[float]) -> None:
    if len(values) != len(weights) or not values:
        raise ValueError(
            f"expected at least one model and a weight for each, found {len(values)} models and "
            f"{len(weights)} weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, found {list(weights)}")
