"""Options of the recurrent loop, and the presets that name the variants of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kifmerge.errors import check_at_least, check_choices
from kifmerge.tensor.fusion import DEFAULT_SHARED_WEIGHTS, Redundant
from kifmerge.tensor.importance import ImportanceOptions, Score, Sensitivity, Weights
from kifmerge.tensor.selection import Scope

Rule = Literal["recurrent-kif", "recurrent-kif-adaptive", "average", "none"]
Role = Literal["new", "historical"]


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
        if len(self.shared_weights) != 2:
            raise ValueError(f"shared_weights must be two numbers, found {self.shared_weights}")
        if not 0.0 <= self.important_fraction <= 1.0:
            raise ValueError(
                f"important_fraction must lie in [0, 1], found {self.important_fraction}"
            )
        if self.temperature <= 0.0:
            raise ValueError(f"temperature must be positive, found {self.temperature}")
        self.importance("new"), self.importance("historical")

    def importance(self, role: Role) -> ImportanceOptions:
        """The options of one side's accumulator."""
        return ImportanceOptions(
            sensitivity=self.sensitivity,
            score=self.score,
            weights=self.weights,
            betas=self.new_betas if role == "new" else self.historical_betas,
        )


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
