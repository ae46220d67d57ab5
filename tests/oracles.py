"""The method once more, slow and in float64, written from its equations and not from the code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Step = tuple[Tensor, Tensor | None]


def step_sensitivity(weight: Tensor, gradient: Tensor | None, kind: str = "first") -> Tensor:
    """|w*g|, (w*g)^2 or |w*g - (w*g)^2/2|; a gradient that is None counts as zero."""
    w = weight.detach().to(torch.float64)
    g = torch.zeros_like(w) if gradient is None else gradient.detach().to(torch.float64)
    product = w * g
    return {
        "first": product.abs(),
        "second": product**2,
        "mixed": (product - product**2 / 2).abs(),
    }[kind]


def smoothed(
    steps: Iterable[Step], *, kind: str = "first", betas: tuple[float, float] = (0.85, 0.85)
) -> tuple[Tensor, Tensor]:
    """S and U of one parameter after the given (weight, gradient) steps, both from 0."""
    b1, b2 = betas
    sensitivity = uncertainty = torch.zeros((), dtype=torch.float64)
    for weight, gradient in steps:
        s = step_sensitivity(weight, gradient, kind)
        sensitivity = b1 * sensitivity + (1 - b1) * s
        uncertainty = b2 * uncertainty + (1 - b2) * (s - sensitivity).abs()
    return sensitivity, uncertainty


def threshold(values: Sequence[float], fraction: str) -> float:
    """The (n - ceil(f*(n-1)))-th smallest value, f an exact decimal."""
    rank = len(values) - math.ceil(Fraction(fraction) * (len(values) - 1))
    return sorted(values)[rank - 1]


def masks(scores: Sequence[Tensor], fraction: str) -> list[Tensor]:
    """True where a score exceeds the threshold over all of them together."""
    x = threshold([value for tensor in scores for value in tensor.flatten().tolist()], fraction)
    return [tensor > x for tensor in scores]


def table_weights(
    new: bool,
    historical: bool,
    shared: tuple[float, float] = (0.4, 0.6),
    redundant: str = "average",
) -> tuple[float, float]:
    """Weights of tau_new and tau_hist for one parameter."""
    neither = (0.5, 0.5) if redundant == "average" else (0.0, 0.0)
    return {
        (True, True): shared,
        (True, False): (1.0, 0.0),
        (False, True): (0.0, 1.0),
        (False, False): neither,
    }[new, historical]


def fused(base: Tensor, after_inner: Tensor, after_outer: Tensor, weights: Tensor) -> Tensor:
    """theta_b + w_new * tau_new + w_hist * tau_hist; ``weights`` has a last dimension of two."""
    b, q, m = (t.detach().to(torch.float64) for t in (base, after_inner, after_outer))
    return b + weights[..., 0] * (q - b) + weights[..., 1] * (m - q)


def masked_weights(new: Tensor, historical: Tensor, **options: object) -> Tensor:
    """The table, element by element, of two masks."""
    pairs = zip(new.flatten().tolist(), historical.flatten().tolist(), strict=True)
    rows = [table_weights(*pair, **options) for pair in pairs]
    return torch.tensor(rows, dtype=torch.float64).reshape(*new.shape, 2)


def softmax_weights(new: Tensor, historical: Tensor, temperature: float) -> Tensor:
    """softmax(I_new/t, I_hist/t) of normalised scores, element by element."""
    stacked = torch.stack([new, historical], dim=-1).to(torch.float64)
    return torch.softmax(stacked / temperature, dim=-1)


def min_max(scores: Sequence[Tensor]) -> list[Tensor]:
    """All scores of a model brought to [0, 1] together; constant ones to 0."""
    low = min(float(tensor.min()) for tensor in scores)
    high = max(float(tensor.max()) for tensor in scores)
    span = high - low
    return [(t.to(torch.float64) - low) / span if span > 0 else t.double() * 0 for t in scores]


def model_weights(marks: Sequence[bool], shares: Sequence[float], redundant: str) -> list[float]:
    """Weights of any number of models for one parameter, from who finds it important."""
    if not any(marks):
        return [1 / len(marks) if redundant == "average" else 0.0] * len(marks)
    total = sum(share for share, mark in zip(shares, marks, strict=True) if mark)
    return [share / total if mark else 0.0 for share, mark in zip(shares, marks, strict=True)]


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """exp(I_i/t) over the sum of all, for one parameter."""
    exponentials = [math.exp(score / temperature) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """w_1 * x_1 + w_2 * x_2 + ..."""
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def kif_value(
    new: float,
    historical: float,
    new_important: bool,
    historical_important: bool,
    shared: tuple[float, float] = (0.3, 0.7),
) -> float:
    """KIF's static rule for one weight."""
    if new_important and historical_important:
        return shared[0] * new + shared[1] * historical
    if new_important or historical_important:
        return new if new_important else historical
    return (new + historical) / 2


def ties_update(values: Sequence[float], kept: Sequence[bool], weights: Sequence[float]) -> float:
    """The merged task vector of TIES for one parameter, from what survived trimming."""
    terms = [w * v for v, w, keep in zip(values, weights, kept, strict=True) if keep]
    sizes = [abs(w) for w, keep in zip(weights, kept, strict=True) if keep]
    sign = 1 if sum(terms) >= 0 else -1
    agreeing = [index for index, term in enumerate(terms) if term * sign > 0]
    if not agreeing:
        return 0.0
    return sum(terms[i] for i in agreeing) / sum(sizes[i] for i in agreeing)


def largest(values: Sequence[float]) -> float:
    """The value of the largest magnitude; the first of several."""
    return max(values, key=abs)


def element_by_element(rule: Callable[..., float], *tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """A rule for one parameter, over all of them; a sequence of tensors gives a list of numbers."""
    flat = [
        t.flatten().tolist()
        if isinstance(t, Tensor)
        else list(zip(*(one.flatten().tolist() for one in t), strict=True))
        for t in tensors
    ]
    like = tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]
    values = [rule(*row) for row in zip(*flat, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(like.shape)


def distance_from_orthonormal(rows: Sequence[Sequence[float]]) -> float:
    """||R R^T - I||_F of a matrix given as rows."""
    return math.sqrt(
        math.fsum(
            (math.fsum(a * b for a, b in zip(first, second, strict=True)) - (i == j)) ** 2
            for i, first in enumerate(rows)
            for j, second in enumerate(rows)
        )
    )
