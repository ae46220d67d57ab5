"""Fusion: the update of a base from the task vectors of new and historical knowledge.

All rules work element by element, compute in float32 and return the dtype of ``base``. Task
vectors are ``new_vector = theta_q - theta_b`` and ``historical_vector = theta_m - theta_q``: where
the inner steps on the new task went from the base, and where the outer steps on memory went on
from there.

References:
    Recurrent-KIF, arXiv 2502.17510, with the weights of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Redundant = Literal["average", "drop"]

DEFAULT_SHARED_WEIGHTS = (0.4, 0.6)

_TAYLOR_DEGREE = 7
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # few enough bits that its multiples by whole numbers are exact
_LN2_LOW = -2.12194440e-4


def recurrent_kif_weights(
    new_important: Tensor,
    historical_important: Tensor,
    *,
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS,
    redundant: Redundant = "average",
) -> tuple[Tensor, Tensor]:
    """Weights of the new and of the historical task vector under the Recurrent-KIF table.

    ======  ==========  =====================  ============================
    new     historical  weight of new          weight of historical
    ======  ==========  =====================  ============================
    yes     yes         ``shared_weights[0]``  ``shared_weights[1]``
    yes     no          1                      0
    no      yes         0                      1
    no      no          1/2 (``average``) or   1/2 (``average``) or
                        0 (``drop``)           0 (``drop``)
    ======  ==========  =====================  ============================

    Args:
        new_important: bool mask of the new task's important parameters.
        historical_important: bool mask of the same shape for the earlier tasks.
        shared_weights: weights where both find the parameter important.
        redundant: what becomes of parameters that neither finds important.

    Returns:
        Two float32 tensors of the masks' shape.

    References:
        Recurrent-KIF, arXiv 2502.17510; the shared and the redundant case as in the released code
        (``average`` halves what the paper's text calls pruned; ``drop`` prunes it).

    >>> new = torch.tensor([True, True, False, False])
    >>> historical = torch.tensor([True, False, True, False])
    >>> recurrent_kif_weights(new, historical)[0]
    tensor([0.4000, 1.0000, 0.0000, 0.5000])
    """
    neither = 0.5 if redundant == "average" else 0.0
    exclusive = new_important ^ historical_important
    both_or_neither = [
        torch.where(new_important, shared, neither).float() for shared in shared_weights
    ]
    return (
        torch.where(exclusive, new_important.float(), both_or_neither[0]),
        torch.where(exclusive, historical_important.float(), both_or_neither[1]),
    )


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
    new_weight, historical_weight = recurrent_kif_weights(
        new_important, historical_important, shared_weights=shared_weights, redundant=redundant
    )
    return add_vectors(base, new_vector, historical_vector, new_weight, historical_weight)


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
    new_weight = _sigmoid((new_score.float() - historical_score.float()) / temperature)
    return add_vectors(base, new_vector, historical_vector, new_weight, 1.0 - new_weight)


def _sigmoid(values: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32, to within two units in the last place, down to 1e-38.

    ``torch.sigmoid`` rounds an element by where it lies: vector registers, and what is left over
    behind them in each thread, have exponentials of their own. A merge must not depend on how its
    tensors are cut, so this takes only operations that IEEE 754 rounds in one way.
    """
    exponent = values.abs().clamp_(max=87.0).neg_()  # exp(-87) is the last normal number
    power = exponent.mul(_LOG2_E).round_()
    rest = exponent.sub_(power.mul(_LN2_HIGH)).sub_(power.mul(_LN2_LOW))
    exponential = torch.full_like(rest, 1.0 / math.factorial(_TAYLOR_DEGREE))
    for degree in reversed(range(_TAYLOR_DEGREE)):
        exponential.mul_(rest).add_(1.0 / math.factorial(degree))
    exponential.mul_(((power.to(torch.int32) + 127) << 23).view(torch.float32))
    return torch.where(values < 0, exponential, 1.0) / (exponential + 1.0)


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
    fused = base.float() + new_weight * new_vector.float()
    return (fused + historical_weight * historical_vector.float()).to(base.dtype)


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
