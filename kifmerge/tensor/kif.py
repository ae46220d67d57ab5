"""KIF: fusion of the weights of two models, unit by unit, and what keeps LoRA ranks apart.

Unlike Recurrent-KIF these rules work on weights, not on task vectors, and need no base. Importance
is that of skill units: masks and scores hold one value per element, the same for all of a unit.
The rules compute in float32 and return the dtype of ``historical``.

References:
    KIF, arXiv 2408.05200, which extends TaSL, arXiv 2408.09857; weights as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kifmerge.tensor.softmax import softmax_weights

DEFAULT_SHARED_WEIGHTS = (0.3, 0.7)
DEFAULT_TEMPERATURE = 0.25


def kif(
    new: Tensor,
    historical: Tensor,
    new_important: Tensor,
    historical_important: Tensor,
    *,
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS,
) -> Tensor:
    """Static fusion of KIF, by what is important to the new task and to the earlier ones.

    ======  ==========  ============================================================
    new     historical  fused
    ======  ==========  ============================================================
    yes     yes         ``shared_weights[0] * new + shared_weights[1] * historical``
    yes     no          new, bit for bit
    no      yes         historical, bit for bit
    no      no          half and half
    ======  ==========  ============================================================

    A mixture is computed as ``historical + weight * (new - historical)``: where both models hold
    the same value it stays.

    Args:
        new: weights after the new task.
        historical: weights after all earlier tasks.
        new_important: bool mask of what is important to the new task.
        historical_important: bool mask of what is important to the earlier tasks.
        shared_weights: of new and historical where both find the unit important; they mix
            weights, so they must add up to 1.

    Raises:
        ValueError: shared weights that do not add up to 1.

    >>> new, historical = torch.full((4,), 10.0), torch.zeros(4)
    >>> new_important = torch.tensor([True, True, False, False])
    >>> historical_important = torch.tensor([True, False, True, False])
    >>> kif(new, historical, new_important, historical_important)
    tensor([ 3., 10.,  0.,  5.])
    """
    if abs(sum(shared_weights) - 1.0) > 1e-6:
        raise ValueError(f"shared weights of models must add up to 1, found {shared_weights}")
    new_weight = torch.where(new_important, shared_weights[0], 0.5)
    mixed = _mix(new, historical, new_weight)
    # Masks of units are true and false in long runs or in step, which a processor predicts:
    # choosing costs little here, and keeps every bit of a value.
    chosen = torch.where(new_important, new, historical)
    return torch.where(new_important ^ historical_important, chosen, mixed)


def kif_adaptive(
    new: Tensor,
    historical: Tensor,
    new_score: Tensor,
    historical_score: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
) -> Tensor:
    """Adaptive fusion of KIF: ``a * new + (1 - a) * historical``, a = softmax(I_new/t, I_hist/t).

    Computed as ``historical + a * (new - historical)``: where both models hold the same value it
    stays.

    Args:
        new: weights after the new task.
        historical: weights after all earlier tasks.
        new_score: unit scores of the new task, min-max normalised over all units.
        historical_score: cumulative scores of the earlier tasks, likewise.
        temperature: t > 0; small values approach a choice, large ones the average.

    Raises:
        ValueError: a temperature that is not above 0.

    >>> new, historical, score = torch.full((1,), 10.0), torch.zeros(1), torch.ones(1)
    >>> kif_adaptive(new, historical, score, score)
    tensor([5.])
    """
    new_weight, _ = softmax_weights((new_score, historical_score), temperature=temperature)
    return _mix(new, historical, new_weight)


def _mix(new: Tensor, historical: Tensor, new_weight: Tensor) -> Tensor:
    """Historical + w * (new - historical) in float32, in the dtype of ``historical``."""
    origin = historical.float()
    return (new.float() - origin).mul_(new_weight).add_(origin).to(historical.dtype)


def orthogonality_penalty(a_factors: Sequence[Tensor], b_factors: Sequence[Tensor]) -> Tensor:
    """How far the ranks of LoRA matrices are from orthonormal; KIF adds 0.1 x this to the loss.

    The mean over all matrices of ``||A A^T - I||_F`` for each A and ``||B^T B - I||_F`` for each B.
    Differentiable, in float32 under autocast too. The gradient of a norm has no limit where the
    ranks are exactly orthonormal, and is taken to be 0 there, a subgradient; everywhere else, at
    B = 0 as well, it is finite by itself.

    Args:
        a_factors: lora_A matrices, [rank, inputs].
        b_factors: lora_B matrices, [outputs, rank].

    Returns:
        A scalar, float32, at least 0.

    Raises:
        ValueError: no matrices.

    References:
        KIF's LoRA variant, arXiv 2408.05200, with the term of the released code.

    >>> orthogonality_penalty([torch.eye(2, 3)], [torch.zeros(3, 4)])
    tensor(1.)
    """
    rows = [*a_factors, *(factor.mT for factor in b_factors)]
    if not rows:
        raise ValueError("expected at least one LoRA matrix, found none")
    device = rows[0].device  # of the result; a model may be spread over several
    with torch.autocast(device.type, enabled=False):
        distances = [_distance_from_orthonormal(matrix.float()).to(device) for matrix in rows]
    return torch.stack(distances).mean()


def _distance_from_orthonormal(rows: Tensor) -> Tensor:
    gram = rows @ rows.mT
    identity = torch.eye(len(rows), dtype=gram.dtype, device=gram.device)
    distance: Tensor = torch.linalg.vector_norm(gram - identity)
    return distance
