"""The fusion rules by name: one pure function and one line in a table each."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from kifmerge.errors import check_choices
from kifmerge.tensor.baselines import linear, magmax, task_arithmetic, ties
from kifmerge.tensor.fusion import (
    average_models,
    recurrent_kif,
    recurrent_kif_adaptive_models,
    recurrent_kif_models,
)
from kifmerge.tensor.kif import DEFAULT_SHARED_WEIGHTS as KIF_SHARED_WEIGHTS
from kifmerge.tensor.kif import kif, kif_adaptive
from kifmerge.tensor.mask_weights import DEFAULT_SHARED_WEIGHTS, Redundant
from kifmerge.tensor.selection import Scope
from kifmerge.tensor.units import UnitKind

RuleName = Literal[
    "recurrent-kif",
    "recurrent-kif-adaptive",
    "average",
    "kif",
    "kif-adaptive",
    "linear",
    "task-arithmetic",
    "ties",
    "magmax",
]
# What a rule is shown of each model, element by element: nothing; a mask of the important
# parameters; scores in [0, 1]; likewise by skill unit; a mask of the largest changes.
Needs = Literal["nothing", "masks", "scores", "unit-masks", "unit-scores", "largest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionOptions:
    """A rule and all that it depends on; each rule looks at the options that it names.

    Attributes:
        rule: its name.
        important_fraction: f, the share found important in each model.
        scope: one threshold over the whole model (``global``) or one per ``tensor``.
        shared_weights: weights of new and historical where both are important; None: the rule's.
        redundant: ``average`` or ``drop`` what no model finds important.
        temperature: of a softmax over scores.
        unit: skill units that importance snapshots are grouped into, for the rules of KIF.
        weights: one number per model, in their order; None: all alike.
        normalise: divide by the sum of the weights.
        scale: of the sum of task vectors.
        density: share of each task vector that is kept.
    """

    rule: RuleName = "recurrent-kif"
    important_fraction: float = 0.2
    scope: Scope = "global"
    shared_weights: tuple[float, float] | None = None
    redundant: Redundant = "average"
    temperature: float = 0.25
    unit: UnitKind = "tensor"
    weights: tuple[float, ...] | None = None
    normalise: bool = True
    scale: float = 1.0
    density: float = 0.2

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and numbers out of range."""
        check_choices(self)
        for name in ("important_fraction", "density"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], found {getattr(self, name)}")
        if self.shared_weights is None:
            object.__setattr__(self, "shared_weights", RULES[self.rule].shared_weights)
        elif [math.isfinite(weight) for weight in self.shared_weights] != [True, True]:
            raise ValueError(f"shared_weights must be two numbers, found {self.shared_weights}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, found {self.temperature}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, found {self.scale}")
        if RULES[self.rule].mixes_weights and abs(sum(self.shared_weights or ()) - 1.0) > 1e-6:
            raise ValueError(
                f"shared_weights of {self.rule} must add up to 1, found {self.shared_weights}"
            )
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: Sequence[float]) -> None:
        if not weights or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, found {weights}")
        if self.needs == "masks" and min(weights) <= 0.0:
            raise ValueError(f"weights of {self.rule} must be positive, found {weights}")
        divides = "normalise" in RULES[self.rule].options and self.normalise
        if divides and sum(weights) == 0.0:
            raise ValueError(f"weights must not add up to 0, found {weights}")

    @property
    def needs(self) -> Needs:
        """What the rule is shown of each model."""
        return RULES[self.rule].needs

    def recorded(self) -> dict[str, Any]:
        """The rule and the options that it looks at, as plain values."""
        return {
            "rule": self.rule,
            **{name: getattr(self, name) for name in RULES[self.rule].options},
        }


# base, task vectors, what is shown of each model, options -> fused weights.
FuseVectors = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], FusionOptions], Tensor]
# weights of each model, what is shown of each, options -> fused weights.
FuseWeights = Callable[[Sequence[Tensor], Sequence[Tensor], FusionOptions], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How models become one, element by element, in float32.

    Attributes:
        needs: what it is shown of each model.
        options: names of the options it depends on.
        fuse_vectors: the function, for a rule on a base and task vectors.
        fuse_weights: the function, for a rule on the weights of the models.
        two_sided: whether the models must be the new one and the historical one.
        mixes_weights: whether the shared weights are those of a mixture, and add up to 1.
        shared_weights: default where both sides are important.
        carries_nonfinite: whether NaN or infinity in any model, or the base, makes the result
            there NaN or infinite too, whatever the options.
    """

    needs: Needs
    options: tuple[str, ...]
    fuse_vectors: FuseVectors | None = None
    fuse_weights: FuseWeights | None = None
    two_sided: bool = False
    mixes_weights: bool = False
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS
    carries_nonfinite: bool = True

    @property
    def needs_base(self) -> bool:
        """Whether it works on task vectors."""
        return self.fuse_vectors is not None


def _recurrent_kif(
    base: Tensor, vectors: Sequence[Tensor], shown: Sequence[Tensor], options: FusionOptions
) -> Tensor:
    if options.weights is not None:
        return recurrent_kif_models(
            base, vectors, shown, options.weights, redundant=options.redundant
        )
    (new, historical), (new_important, historical_important) = vectors, shown
    assert options.shared_weights is not None
    return recurrent_kif(
        base, new, historical, new_important, historical_important,
        shared_weights=options.shared_weights, redundant=options.redundant,
    )  # fmt: skip


def _kif(models: Sequence[Tensor], shown: Sequence[Tensor], options: FusionOptions) -> Tensor:
    assert options.shared_weights is not None
    return kif(*models, *shown, shared_weights=options.shared_weights)


def all_alike(options: FusionOptions, num_models: int) -> Sequence[float]:
    """The weights of the models, 1 each unless told otherwise."""
    return options.weights or (1.0,) * num_models


RULES: Mapping[RuleName, Rule] = {
    "recurrent-kif": Rule(
        needs="masks",
        options=("important_fraction", "scope", "shared_weights", "redundant", "weights"),
        fuse_vectors=_recurrent_kif,
    ),
    "recurrent-kif-adaptive": Rule(
        needs="scores",
        options=("temperature",),
        fuse_vectors=lambda base, vectors, shown, options: recurrent_kif_adaptive_models(
            base, vectors, shown, temperature=options.temperature
        ),
    ),
    "average": Rule(
        needs="nothing",
        options=(),
        fuse_vectors=lambda base, vectors, shown, options: average_models(base, vectors),
    ),
    "kif": Rule(
        needs="unit-masks",
        options=("important_fraction", "shared_weights", "unit"),
        fuse_weights=_kif,
        two_sided=True,
        mixes_weights=True,
        shared_weights=KIF_SHARED_WEIGHTS,
        carries_nonfinite=False,
    ),
    "kif-adaptive": Rule(
        needs="unit-scores",
        options=("temperature", "unit"),
        fuse_weights=lambda models, shown, options: kif_adaptive(
            *models, *shown, temperature=options.temperature
        ),
        two_sided=True,
    ),
    "linear": Rule(
        needs="nothing",
        options=("weights", "normalise"),
        fuse_weights=lambda models, shown, options: linear(
            models, all_alike(options, len(models)), normalise=options.normalise
        ),
    ),
    "task-arithmetic": Rule(
        needs="nothing",
        options=("weights", "scale"),
        fuse_vectors=lambda base, vectors, shown, options: task_arithmetic(
            base, vectors, all_alike(options, len(vectors)), scale=options.scale
        ),
    ),
    "ties": Rule(
        needs="largest",
        options=("density", "scope", "weights", "scale"),
        fuse_vectors=lambda base, vectors, shown, options: ties(
            base, vectors, shown, all_alike(options, len(vectors)), scale=options.scale
        ),
    ),
    "magmax": Rule(
        needs="nothing",
        options=("scale",),
        fuse_vectors=lambda base, vectors, shown, options: magmax(
            base, vectors, scale=options.scale
        ),
    ),
}

assert tuple(RULES) == typing.get_args(RuleName)
