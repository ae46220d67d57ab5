"""Weights of task vectors, from masks of what each model finds important.

A weight depends on nothing but which models find an element important: :func:`by_code` has them for
each of these cases, which are few.

References:
    Recurrent-KIF, arXiv 2502.17510, with the weights of the authors' released code; those of any
    number of models are our generalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Redundant = Literal["average", "drop"]

DEFAULT_SHARED_WEIGHTS = (0.4, 0.6)


def indicator(mask: Tensor) -> Tensor:
    """A bool mask as float32: 1 where it is true, 0 where it is not. Always a new tensor.

    >>> indicator(torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return mask.view(torch.uint8).float()  # read as bytes it is seven times faster than as bool


def recurrent_kif_weights(
    new_important: Tensor,
    historical_important: Tensor,
    *,
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS,
    redundant: Redundant = "average",
) -> Iterator[Tensor]:
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

    Yields:
        Two new float32 tensors of the masks' shape.

    References:
        Recurrent-KIF, arXiv 2502.17510; the shared and the redundant case as in the released code
        (``average`` halves what the paper's text calls pruned; ``drop`` prunes it).

    >>> new = torch.tensor([True, True, False, False])
    >>> historical = torch.tensor([True, False, True, False])
    >>> next(recurrent_kif_weights(new, historical))
    tensor([0.4000, 1.0000, 0.0000, 0.5000])
    """
    new, historical = (mask.view(torch.uint8) for mask in (new_important, historical_important))
    both = new & historical
    # What is not shared, in whole steps: of 1 in (n, h), or of 1/2 in (1 + n - h, 1 - n + h).
    if redundant == "drop":
        step, unshared = 1.0, (new - both, historical - both)
    else:
        lead, rest = new - historical, both ^ 1  # bytes wrap around, and back in the sum
        step, unshared = 0.5, (rest + lead, rest - lead)
    shared = both.float()
    for steps, weight in zip(unshared, shared_weights, strict=True):
        # A number times 0 or 1 is exact, so that add_ may fuse the two operations or not.
        yield steps.float().mul_(step).add_(shared, alpha=weight)


def importance_weights(
    important: Sequence[Tensor], shares: Sequence[float], *, redundant: Redundant = "average"
) -> Iterator[Tensor]:
    """Weights of any number of task vectors from the masks of what each model finds important.

    With P the models that find a parameter important, ``w_i = s_i / sum over P of s_j`` for i in
    P, and 0 for the others; where P is empty 1/N for each (``average``) or 0 (``drop``).

    Args:
        important: one bool mask per model, of one shape.
        shares: s, one number above 0 per model; only their ratios matter.
        redundant: what becomes of parameters that no model finds important.

    Yields:
        One new float32 tensor per model.

    Raises:
        ValueError: no models, not one share for each, or a share that is not above 0 and finite.

    References:
        Ours. With two models of shares 0.4 and 0.6 the weights are those of
        :func:`recurrent_kif_weights`, to the bit; with two others that add up to 1 to within a
        unit in the last place.

    >>> masks = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    >>> list(importance_weights(masks, [1.0, 3.0]))
    [tensor([0.2500, 1.0000, 0.5000]), tensor([0.7500, 0.0000, 0.5000])]
    """
    if len(important) != len(shares) or not important:
        raise ValueError(
            f"expected at least one mask and a share for each, found {len(important)} masks and "
            f"{len(shares)} shares"
        )
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise ValueError(f"shares must be finite and above 0, found {list(shares)}")
    return _of_models(important, shares, redundant)


def _of_models(
    masks: Sequence[Tensor], shares: Sequence[float], redundant: Redundant
) -> Iterator[Tensor]:
    nobody = masks[0].view(torch.uint8) ^ 1
    for mask in masks[1:]:
        nobody &= mask.view(torch.uint8) ^ 1
    redundant_weight = nobody.float()
    total = redundant_weight.clone()  # 1 where there is nothing to divide
    for mask, share in zip(masks, shares, strict=True):
        total.add_(indicator(mask), alpha=share)
    redundant_weight.mul_(1.0 / len(masks) if redundant == "average" else 0.0)
    for mask, share in zip(masks, shares, strict=True):
        weight = indicator(mask)
        yield torch.add(redundant_weight, weight, alpha=share, out=weight).div_(total)


def by_code(weights_of: Callable[[Sequence[Tensor]], Iterable[Tensor]], num_masks: int) -> Tensor:
    """Weights for each set of masks that may hold an element.

    Args:
        weights_of: masks -> a weight for each, element by element.
        num_masks: that it is given.

    Returns:
        One row per mask, of 2 ** num_masks: in the i-th column where those masks hold an element
        whose bits i has, the first mask's the least significant.

    >>> by_code(lambda masks: recurrent_kif_weights(*masks), 2)
    tensor([[0.5000, 1.0000, 0.0000, 0.4000],
            [0.5000, 0.0000, 1.0000, 0.6000]])
    """
    codes = torch.arange(1 << num_masks, device="cpu")
    masks = [(codes >> bit & 1).to(torch.bool) for bit in range(num_masks)]
    return torch.stack(list(weights_of(masks)))
