"""Softmax over models, element by element, with the same bits however the tensors are cut.

``torch.softmax`` and ``sigmoid`` round an element by where it lies: vector registers, and what is
left over behind them in each thread, have exponentials of their own; ``torch.exp`` promises no
better. A merge must not depend on its chunks or threads, so only operations that IEEE 754 rounds in
one way are used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_TAYLOR_DEGREE = 7
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # few enough bits that its multiples by whole numbers are exact
_LN2_LOW = -2.12194440e-4


def softmax_weights(scores: Sequence[Tensor], *, temperature: float) -> list[Tensor]:
    """Weights of models by their scores: ``exp(I_i / t) / sum over j of exp(I_j / t)``.

    Two models take ``w_1 = 1 / (1 + exp((I_2 - I_1) / t))`` and ``w_2 = 1 - w_1``, as adaptive
    Recurrent-KIF has it; more take the quotient, the largest score subtracted first.

    Args:
        scores: one tensor per model, of one shape, brought to [0, 1] over each whole model.
        temperature: t > 0; small values approach a choice, large ones the average.

    Returns:
        One float32 tensor per model, right to a few units in the last place; w_2 of two models, to
        as much of w_1's.

    Raises:
        ValueError: no scores, or a temperature that is not above 0.

    >>> softmax_weights([torch.ones(1), torch.ones(1)], temperature=0.25)
    [tensor([0.5000]), tensor([0.5000])]
    """
    if not scores:
        raise ValueError("expected the scores of at least one model, found none")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    if len(scores) == 2:
        first = _sigmoid((scores[0].float() - scores[1].float()).div_(temperature))
        return [first, 1.0 - first]
    largest = scores[0].float()
    for score in scores[1:]:
        largest = torch.maximum(largest, score.float())
    exponentials = [_exp_of_minus((largest - score.float()).div_(temperature)) for score in scores]
    total = exponentials[0].clone()
    for exponential in exponentials[1:]:
        total.add_(exponential)
    return [exponential.div_(total) for exponential in exponentials]


def _sigmoid(values: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32, to within two units in the last place, down to 1e-38."""
    exponential = _exp_of_minus(values.abs())
    # For x >= 0 the numerator is 1, the larger of the two; a comparison would take far longer.
    return torch.maximum(exponential, values.sign()).div_(exponential.add_(1.0))


def _exp_of_minus(values: Tensor) -> Tensor:
    """exp(-x) of its own float32 argument, x >= 0, which it overwrites."""
    exponent = values.clamp_(max=87.0).neg_()  # exp(-87) is the last normal number
    power = exponent.mul(_LOG2_E).round_()
    rest = exponent.sub_(power.mul(_LN2_HIGH)).sub_(power.mul(_LN2_LOW))
    exponential = torch.full_like(rest, 1.0 / math.factorial(_TAYLOR_DEGREE))
    for degree in reversed(range(_TAYLOR_DEGREE)):
        exponential.mul_(rest).add_(1.0 / math.factorial(degree))
    powers_of_two = power.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return exponential.mul_(powers_of_two)
