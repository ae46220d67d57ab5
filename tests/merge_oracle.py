"""What a merge should come to: all rules by brute force in float64, from what lies in the folders.

Written from the definitions: one number at a time, over the whole model at once, nothing streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import oracles
import torch
from merges import Variant
from torch import Tensor

from kifmerge.fusion.rules import FusionOptions

MASK_FRACTION = "0.4"

State = Mapping[str, Tensor]


class Inputs(Protocol):
    """What a merge reads, however it is kept."""

    states: Sequence[State]

    def scores(self, role: str) -> State: ...


# What one rule makes of one element: base, weights of the models, what is shown of each, vectors.
Element = Callable[[float, list[float], list[float], list[float]], float]


def expected(inputs: Inputs, variant: Variant) -> dict[str, Tensor]:
    """Every tensor of the result, in float64."""
    rule = variant.rule
    base, *models = inputs.states
    starts = [base] * len(models)
    if variant.parent == "new":
        starts[1] = models[0]
    vectors = [
        {name: model[name].double() - start[name].double() for name in base}
        for model, start in zip(models, starts, strict=True)
    ]
    shown = _shown(inputs, variant, vectors)
    element = _element(rule, len(models))
    return {
        name: oracles.element_by_element(
            element,
            base[name].double(),
            [model[name].double() for model in models],
            [side.get(name, base[name]).double() for side in shown] or [base[name].double()],
            [vector[name] for vector in vectors],
        )
        for name in base
    }


def _element(rule: FusionOptions, num_models: int) -> Element:
    shares = rule.weights or (1.0,) * num_models
    scale = rule.scale
    table: dict[str, Element] = {
        "recurrent-kif": lambda b, m, s, v: b + oracles.weighted(v, _masked(rule, s)),
        "recurrent-kif-adaptive": lambda b, m, s, v: (
            b + oracles.weighted(v, oracles.softmax(s, rule.temperature))
        ),
        "average": lambda b, m, s, v: b + sum(v) / num_models,
        "kif": lambda b, m, s, v: oracles.kif_value(*m, *map(bool, s), shared=rule.shared_weights),
        "kif-adaptive": lambda b, m, s, v: oracles.weighted(
            m, oracles.softmax(s, rule.temperature)
        ),
        "linear": lambda b, m, s, v: (
            oracles.weighted(m, shares) / (sum(shares) if rule.normalise else 1.0)
        ),
        "task-arithmetic": lambda b, m, s, v: b + scale * oracles.weighted(v, shares),
        "ties": lambda b, m, s, v: (
            b + scale * oracles.ties_update(v, [bool(mark) for mark in s], shares)
        ),
        "magmax": lambda b, m, s, v: b + scale * oracles.largest(v),
    }
    return table[rule.rule]


def _masked(rule: FusionOptions, marks: Sequence[float]) -> Sequence[float]:
    important = [bool(mark) for mark in marks]
    if rule.weights is not None:
        return oracles.model_weights(important, rule.weights, rule.redundant)
    return oracles.table_weights(*important, shared=rule.shared_weights, redundant=rule.redundant)


def _shown(inputs: Inputs, variant: Variant, vectors: Sequence[State]) -> list[State]:
    """One number per element and model: a mask as 0 and 1, or a score."""
    rule, roles = variant.rule, variant.roles
    if rule.needs == "nothing":
        return []
    if rule.needs == "largest":
        return [largest(vector, rule.density, rule.scope) for vector in vectors]
    scores = {role: inputs.scores(role) for role in roles}
    if variant.evidence == "masks":
        return [_marks(scores[role], MASK_FRACTION, "global") for role in roles]
    if variant.evidence == "units" or rule.needs.startswith("unit-"):
        return [_unit_values(inputs, scores[role], role, variant) for role in roles]
    if rule.needs == "scores":
        full = {r: {n: t for n, t in side.items() if t.numel()} for r, side in scores.items()}
        return [
            dict(zip(full[r], oracles.min_max(list(full[r].values())), strict=True)) for r in roles
        ]
    return [_marks(scores[role], str(rule.important_fraction), rule.scope) for role in roles]


def _marks(scores: State, fraction: str, scope: str) -> State:
    scores = {name: score for name, score in scores.items() if score.numel()}
    if scope == "tensor":
        return {name: oracles.masks([score], fraction)[0] for name, score in scores.items()}
    return dict(zip(scores, oracles.masks(list(scores.values()), fraction), strict=True))


def largest(vector: State, density: float, scope: str) -> State:
    """True for the ceil(density * n) largest, and for all that equal the smallest of them."""
    if scope == "tensor":
        return {n: largest({n: value}, density, "global")[n] for n, value in vector.items()}
    sizes = sorted((abs(v) for t in vector.values() for v in t.flatten().tolist()), reverse=True)
    num_kept = math.ceil(density * len(sizes))
    smallest = sizes[num_kept - 1] if num_kept else math.inf
    return {name: value.abs() >= smallest for name, value in vector.items()}


def _unit_values(inputs: Inputs, scores: State, role: str, variant: Variant) -> State:
    """Of units that are whole tensors."""
    rule = variant.rule
    scores = {name: score for name, score in scores.items() if score.numel()}
    values = np.array([score.double().mean().item() for score in scores.values()])
    if role == "historical" and variant.evidence == "units":
        first = inputs.scores("first")
        before = np.array([first[name].double().mean().item() for name in scores])
        values = _min_max(0.3 * _min_max(values) + 0.7 * _min_max(before))
    values = _min_max(values)
    if rule.needs in ("masks", "unit-masks"):
        values = values > np.quantile(values, 1 - rule.important_fraction)
    return {
        name: torch.full(score.shape, float(value))
        for (name, score), value in zip(scores.items(), values, strict=True)
    }


def _min_max(values: np.ndarray) -> np.ndarray:
    extent = values.max() - values.min()
    return (values - values.min()) / extent if extent else values * 0
