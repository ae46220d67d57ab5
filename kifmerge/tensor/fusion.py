"""Fusion: the update of a base from task vectors, guided by importance.

All rules work element by element, compute in float32 and return the dtype of ``base``. With two
sides the task vectors are ``new_vector = theta_q - theta_b`` and ``historical_vector = theta_m -
theta_q``: where the inner steps on the new task went from the base, and where the outer steps on
memory went on from there. With any number of models every vector starts at the base.

Every operation here rounds in one way, wherever an element lies: bits do not depend on how tensors
are cut. Masks are turned into numbers, since on a CPU ``torch.where`` and comparisons take many
times as long as arithmetic.

References:
    Recurrent-KIF, arXiv 2502.17510, with the weights of the authors' released code; the rules for
    any number of models are our generalisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kifmerge.tensor.mask_weights import (
    DEFAULT_SHARED_WEIGHTS,
    Redundant,
    importance_weights,
    recurrent_kif_weights,
)
from kifmerge.tensor.softmax import softmax_weights


def recurrent_kif(
    base: Tensor,
    new_vector: Tensor,
    historical_vector: Tensor,
    new_important: Tensor,
    historical_important: Tensor,
    *,
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS,
    redundant: Redundant = "average",
) -> Tensor:
    """One fusion of Recurrent-KIF: base + w_new * new_vector + w_hist * historical_vector.

    Weights are those of :func:`recurrent_kif_weights`. All tensors have one shape.

    >>> yes, no = torch.tensor([True]), torch.tensor([False])
    >>> recurrent_kif(torch.ones(1), torch.ones(1), 2 * torch.ones(1), yes, no)
    tensor([2.])
    """
    weights = recurrent_kif_weights(
        new_important, historical_important, shared_weights=shared_weights, redundant=redundant
    )
    return _add_weighted(base, (new_vector, historical_vector), weights)


def recurrent_kif_adaptive(
    base: Tensor,
    new_vector: Tensor,
    historical_vector: Tensor,
    new_score: Tensor,
    historical_score: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """One fusion of adaptive Recurrent-KIF: softmax weights instead of masks.

    ``w_new = softmax(I_new / t, I_hist / t)`` and ``w_hist = 1 - w_new``.

    Args:
        base: weights at the start of the round.
        new_vector: task vector of the new task.
        historical_vector: task vector of the earlier tasks.
        new_score: scores min-max normalised over the whole model (:func:`score_bounds`).
        historical_score: likewise.
        temperature: t > 0; small values approach a choice, large ones the average.

    References:
        The adaptive ablation of Recurrent-KIF, arXiv 2502.17510.

    >>> one = torch.ones(1)
    >>> recurrent_kif_adaptive(0 * one, one, one, one, one, temperature=0.25)
    tensor([1.])
    """
    weights = softmax_weights((new_score, historical_score), temperature=temperature)
    return _add_weighted(base, (new_vector, historical_vector), weights)


def add_vectors(
    base: Tensor,
    new_vector: Tensor,
    historical_vector: Tensor,
    new_weight: Tensor | float,
    historical_weight: Tensor | float,
) -> Tensor:
    """Base + new_weight * new_vector + historical_weight * historical_vector, in float32.

    With 1/2 and 1/2 this is the control without importance, ``recurrent-average``.

    >>> add_vectors(torch.ones(1), torch.ones(1), torch.ones(1), 0.5, 0.5)
    tensor([2.])
    """
    return _add_terms(
        base, (new_weight * new_vector.float(), historical_weight * historical_vector.float())
    )


def _add_weighted(base: Tensor, vectors: Sequence[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Base + w_1 * v_1 + w_2 * v_2 + ..., in this order; overwrites the weights."""
    pairs = zip(vectors, weights, strict=True)
    return _add_terms(base, (weight.mul_(vector.float()) for vector, weight in pairs))


def _add_terms(base: Tensor, terms: Iterable[Tensor]) -> Tensor:
    """Base + t_1 + t_2 + ..., in this order and in float32; overwrites the terms."""
    fused: Tensor | None = None
    for term in terms:
        fused = term.add_(base.float()) if fused is None else fused.add_(term)
    if fused is None:
        raise ValueError("expected at least one task vector, found none")
    return fused.to(base.dtype)


def recurrent_kif_models(
    base: Tensor,
    vectors: Sequence[Tensor],
    important: Sequence[Tensor],
    shares: Sequence[float],
    *,
    redundant: Redundant = "average",
) -> Tensor:
    """Recurrent-KIF for any number of models: base + w_1 * v_1 + w_2 * v_2 + ..., in their order.

    Weights are those of :func:`importance_weights`, made one at a time. All tensors have one shape.

    >>> yes, no = torch.tensor([True]), torch.tensor([False])
    >>> vectors = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]
    >>> recurrent_kif_models(torch.ones(1), vectors, [yes, yes, no], [1.0, 3.0, 1.0])
    tensor([2.7500])
    """
    return _add_weighted(base, vectors, importance_weights(important, shares, redundant=redundant))


def recurrent_kif_adaptive_models(
    base: Tensor, vectors: Sequence[Tensor], scores: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Adaptive Recurrent-KIF for any number of models, softmax weights instead of masks.

    Weights are those of :func:`kifmerge.tensor.softmax.softmax_weights`; the task vectors are added
    to the base in the models' order. Equal to :func:`recurrent_kif_adaptive` for two models, and to
    :func:`average_models` where all scores are equal, to the bit.

    Args:
        base: weights that all task vectors start from.
        vectors: one task vector per model.
        scores: one tensor per model, min-max normalised over the whole model.
        temperature: t > 0; small values approach a choice, large ones the average.

    >>> one = torch.ones(1)
    >>> recurrent_kif_adaptive_models(one, [one, one, one], [one, one, one], temperature=0.25)
    tensor([2.])
    """
    return _add_weighted(base, vectors, softmax_weights(scores, temperature=temperature))


def average_models(base: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """The control without importance: base + v_1 / N + v_2 / N + ..., in the models' order.

    >>> average_models(torch.ones(1), [torch.ones(1), torch.ones(1), torch.ones(1)])
    tensor([2.])
    """
    return _add_terms(base, (vector.float() * (1.0 / len(vectors)) for vector in vectors))


def score_bounds(scores: Iterable[Tensor]) -> tuple[float, float]:
    """Smallest and largest of all scores of a model.

    >>> score_bounds([torch.tensor([1.0, 3.0]), torch.tensor([2.0])])
    (1.0, 3.0)
    """
    smallest, largest = float("inf"), float("-inf")
    for tensor in scores:
        if tensor.numel():
            low, high = torch.aminmax(tensor.detach().float())
            smallest, largest = min(smallest, float(low)), max(largest, float(high))
    return smallest, largest


def normalise(scores: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Min-max normalisation to [0, 1]; constant scores become 0.

    >>> normalise(torch.tensor([1.0, 2.0, 3.0]), (1.0, 3.0))
    tensor([0.0000, 0.5000, 1.0000])
    """
    smallest, largest = bounds
    if largest <= smallest:
        return torch.zeros_like(scores, dtype=torch.float32)
    return (scores.float() - smallest) / (largest - smallest)
