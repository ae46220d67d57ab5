"""Options of the recurrent loop and of KIF, and the presets that name the loop's variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from kifmerge.errors import check_at_least, check_choices
from kifmerge.fusion.fuse import Role
from kifmerge.fusion.rules import FusionOptions, RuleName
from kifmerge.tensor.importance import (
    WITH_PARAMETERS,
    AccumulatorDtype,
    ImportanceOptions,
    Score,
    Sensitivity,
    Weights,
)
from kifmerge.tensor.kif import DEFAULT_SHARED_WEIGHTS as KIF_SHARED_WEIGHTS
from kifmerge.tensor.kif import DEFAULT_TEMPERATURE
from kifmerge.tensor.mask_weights import DEFAULT_SHARED_WEIGHTS, Redundant
from kifmerge.tensor.selection import Scope
from kifmerge.tensor.units import (
    DEFAULT_CUMULATIVE_WEIGHT,
    DEFAULT_IMPORTANT_FRACTION,
    DEFAULT_NEW_WEIGHT,
    UnitKind,
)

Rule = Literal["recurrent-kif", "recurrent-kif-adaptive", "average", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentOptions:
    """Everything in which variants of the recurrent loop differ.

    Attributes:
        rule: how a round is fused: by importance masks (``recurrent-kif``), by softmax weights
            (``recurrent-kif-adaptive``), half and half (``average``), or not at all (``none``:
            the same inner and outer steps, kept as they are).
        inner_steps: Q, optimizer steps on the new task per round.
        outer_steps: M, optimizer steps on memory per round.
        outer_batch_size: memory rows per outer step; None takes the inner step's whole batch.
        important_fraction: f, the share of parameters found important on each side.
        scope: one threshold over the whole model (``global``) or one per ``tensor``.
        shared_weights: weights of new and historical where both are important.
        redundant: ``average`` or ``drop`` what neither side finds important.
        temperature: of the softmax in ``recurrent-kif-adaptive``.
        sensitivity: see :class:`kifmerge.tensor.importance.ImportanceOptions`, as are the next two.
        score: S*U or S alone.
        weights: w after or before the step.
        new_betas: smoothing on the new task.
        historical_betas: smoothing on memory.
        accumulator_dtype: ``float32``, or ``bfloat16`` in half the memory with S and U off by about
            0.3 %: see :class:`kifmerge.tensor.importance.ImportanceOptions`.
        accumulator_device: ``parameters`` keeps them beside the parameters; or a device, ``cpu``.
        new_scores: whether the new side's accumulators are ``emptied`` or ``kept`` over rounds.
        historical_scores: likewise for the historical side.
        outer_optimizer: ``shared``: the Trainer's own makes the outer steps too; ``separate``: a
            second one of the same class, at ``outer_learning_rate``, constant.
        outer_learning_rate: of the separate outer optimizer.
        outer_loss: ``whole``, or ``divided`` by the accumulation count as the release does.
        accumulated_loss: ``trainer`` leaves the weighting of micro-batches to the Trainer,
            ``micro-batch`` averages their mean losses, as the release does.
        tail: last steps that fill no round: ``fuse`` them like a round or ``keep`` them unfused.
        nonfinite: a step with a NaN or infinite gradient is left out whole (``skip``), or ends
            the training (``raise``).
    """

    rule: Rule = "recurrent-kif"
    inner_steps: int = 8
    outer_steps: int = 4
    outer_batch_size: int | None = None
    important_fraction: float = 0.2
    scope: Scope = "global"
    shared_weights: tuple[float, float] = DEFAULT_SHARED_WEIGHTS
    redundant: Redundant = "average"
    temperature: float = 0.25
    sensitivity: Sensitivity = "first"
    score: Score = "product"
    weights: Weights = "after"
    new_betas: tuple[float, float] = (0.85, 0.85)
    historical_betas: tuple[float, float] = (0.85, 0.85)
    accumulator_dtype: AccumulatorDtype = "float32"
    accumulator_device: str = WITH_PARAMETERS
    new_scores: Literal["emptied", "kept"] = "emptied"
    historical_scores: Literal["emptied", "kept"] = "kept"
    outer_optimizer: Literal["shared", "separate"] = "shared"
    outer_learning_rate: float = 1e-3
    outer_loss: Literal["whole", "divided"] = "whole"
    accumulated_loss: Literal["trainer", "micro-batch"] = "trainer"
    tail: Literal["fuse", "keep"] = "fuse"
    nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and numbers out of range."""
        check_choices(self)
        check_at_least(self, inner_steps=1, outer_steps=1, outer_batch_size=1)
        FusionOptions(
            important_fraction=self.important_fraction,
            shared_weights=self.shared_weights,
            temperature=self.temperature,
        )
        self.importance("new"), self.importance("historical")

    @property
    def fusion(self) -> FusionOptions:
        """The rule with its own options, as the engine takes them; not for ``none``."""
        return FusionOptions(
            rule=cast(RuleName, self.rule),
            important_fraction=self.important_fraction,
            scope=self.scope,
            shared_weights=self.shared_weights,
            redundant=self.redundant,
            temperature=self.temperature,
        )

    def importance(self, role: Role) -> ImportanceOptions:
        """The options of one side's accumulator."""
        return ImportanceOptions(
            sensitivity=self.sensitivity,
            score=self.score,
            weights=self.weights,
            betas=self.new_betas if role == "new" else self.historical_betas,
            accumulator_dtype=self.accumulator_dtype,
            accumulator_device=self.accumulator_device,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KifOptions:
    """Everything in which variants of KIF differ: one fusion per task, unit by unit.

    Attributes:
        unit: what has one score: a whole weight ``tensor``, a ``lora-rank`` (row r of A with
            column r of B), or a ``layer``.
        sensitivity: see :class:`kifmerge.tensor.importance.ImportanceOptions`; None takes
            ``mixed`` for ``lora-rank`` and ``first`` for the others. So are the next two.
        score: S*U or S alone.
        betas: smoothing of sensitivity and of uncertainty.
        accumulator_dtype: as in the recurrent loop, as is the next.
        accumulator_device: of the accumulators.
        first_step: whether a task's very first optimizer step is ``left-out`` of the scores, as
            the release does, or ``counted``.
        important_fraction: the share of units found important on each side.
        shared_weights: weights of new and historical where both find a unit important.
        temperature: of the softmax in ``kif-adaptive``.
        new_weight: of the task's scores in the cumulative ones.
        cumulative_weight: of the cumulative scores before the task.
        orthogonality: weight of the term that keeps LoRA ranks orthogonal in training; None takes
            0.1 for ``lora-rank`` and 0 for the others.
        memory_steps: of ``kif-m``: optimizer steps on memory after the fusion; None: once through.
        memory_learning_rate: of ``kif-m``, constant; None takes the task's.
    """

    unit: UnitKind = "tensor"
    sensitivity: Sensitivity | None = None
    score: Score = "product"
    betas: tuple[float, float] = (0.85, 0.85)
    accumulator_dtype: AccumulatorDtype = "float32"
    accumulator_device: str = WITH_PARAMETERS
    first_step: Literal["left-out", "counted"] = "left-out"
    important_fraction: float = DEFAULT_IMPORTANT_FRACTION
    shared_weights: tuple[float, float] = KIF_SHARED_WEIGHTS
    temperature: float = DEFAULT_TEMPERATURE
    new_weight: float = DEFAULT_NEW_WEIGHT
    cumulative_weight: float = DEFAULT_CUMULATIVE_WEIGHT
    orthogonality: float | None = None
    memory_steps: int | None = None
    memory_learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and numbers out of range."""
        check_choices(self)
        check_at_least(
            self, orthogonality=0, memory_steps=1, memory_learning_rate=0, new_weight=0,
            cumulative_weight=0,
        )  # fmt: skip
        if self.new_weight + self.cumulative_weight == 0.0:
            raise ValueError("new_weight and cumulative_weight: expected one of them above 0")
        _ = self.fusion("kif"), self.importance

    def fusion(self, rule: Literal["kif", "kif-adaptive"]) -> FusionOptions:
        """A rule with its own options, as the engine takes them."""
        return FusionOptions(
            rule=rule,
            important_fraction=self.important_fraction,
            shared_weights=self.shared_weights,
            temperature=self.temperature,
            unit=self.unit,
        )

    @property
    def importance(self) -> ImportanceOptions:
        """The options of the accumulator."""
        by_unit: Sensitivity = "mixed" if self.unit == "lora-rank" else "first"
        return ImportanceOptions(
            sensitivity=self.sensitivity or by_unit,
            score=self.score,
            betas=self.betas,
            accumulator_dtype=self.accumulator_dtype,
            accumulator_device=self.accumulator_device,
        )

    @property
    def orthogonality_weight(self) -> float:
        """Of the term in training."""
        by_unit = 0.1 if self.unit == "lora-rank" else 0.0
        return by_unit if self.orthogonality is None else self.orthogonality


_RELEASED = RecurrentOptions(outer_loss="divided", accumulated_loss="micro-batch", tail="keep")

PRESETS: Mapping[str, RecurrentOptions] = {
    # The default: the released method with the outer loss whole and the tail fused.
    "kifmerge": RecurrentOptions(),
    # What the authors' code computes; the golden traces hold it to that.
    "released": _RELEASED,
    # A reconstruction from notes on the paper, unverified: pure masks, a real outer optimizer.
    "paper": replace(
        _RELEASED,
        new_betas=(0.55, 0.55),
        historical_betas=(0.55, 0.55),
        shared_weights=(1.0, 1.0),
        redundant="drop",
        outer_optimizer="separate",
        outer_loss="whole",
    ),
}
