"""The rounds of Recurrent-KIF over a set of live parameters; knows no Trainer and no data.

One round: inner steps on the new task lead from theta_b to theta_q, outer steps on memory from
there to theta_m; both sides' importance is accumulated on the way; the two task vectors are fused
into theta_{b+1}, in place, and the next round starts there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kifmerge.errors import check_choices
from kifmerge.tensor.fusion import (
    DEFAULT_SHARED_WEIGHTS,
    Redundant,
    add_vectors,
    normalise,
    recurrent_kif,
    recurrent_kif_adaptive,
    score_bounds,
)
from kifmerge.tensor.importance import (
    ImportanceAccumulator,
    ImportanceOptions,
    Score,
    Sensitivity,
    Weights,
)
from kifmerge.tensor.selection import Scope, Threshold, importance_threshold, mask_above

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
        for name in ("inner_steps", "outer_steps", "outer_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round did. Shares are of all trained parameters and add up to 1.

    Thresholds and shares are None under rules that use no masks; with ``scope: tensor`` there is
    no one threshold either.
    """

    index: int
    inner_steps: int
    outer_steps: int
    outer_loss: float
    new_threshold: float | None = None
    historical_threshold: float | None = None
    both: float | None = None
    new_only: float | None = None
    historical_only: float | None = None
    neither: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class RecurrentRounds:
    """Holds theta_b, theta_q and both accumulators, and fuses the live parameters in place.

    The caller makes the optimizer steps and reports each: ``observe("new")`` for inner,
    ``observe("historical")`` for outer ones, ``begin_outer()`` between the two, ``fuse()`` at the
    end. Extra memory: four float32 accumulators and two copies of the parameters.

    Attributes:
        accumulators: role -> accumulator; empty under rules that need no importance.
        num_rounds: rounds fused so far.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], options: RecurrentOptions
    ) -> None:
        self.options = options
        self.num_rounds = 0
        self.accumulators: dict[Role, ImportanceAccumulator] = {}
        if options.rule in ("recurrent-kif", "recurrent-kif-adaptive"):
            for role in ("new", "historical"):
                self.accumulators[role] = ImportanceAccumulator(
                    parameters, options.importance(role)
                )
        self._parameters = dict(parameters)
        self._fuses = options.rule != "none"
        self._base = self._copy() if self._fuses else {}
        self._inner: dict[str, Tensor] = {}

    def observe(self, role: Role) -> None:
        """Take one step's weights and gradients into the importance of ``role``."""
        if role in self.accumulators:
            live = self._parameters.values()
            self.accumulators[role].update(list(live), [p.grad for p in live])

    def begin_outer(self) -> None:
        """Remember theta_q: the inner steps of this round are over."""
        if self._fuses:
            self._inner = self._copy()

    @torch.no_grad()
    def fuse(self, *, inner_steps: int, outer_steps: int, outer_loss: float) -> Round:
        """Replace the live parameters by theta_{b+1} and begin the next round from there."""
        details: dict[str, float | None] = {}
        if self._fuses:
            fuse_one = self._masked(details) if self.options.rule == "recurrent-kif" else None
            fuse_one = fuse_one or self._adaptive_or_average()
            for name, parameter in self._parameters.items():
                base, inner = self._base[name], self._inner[name]
                new_vector = inner.float() - base.float()
                historical_vector = parameter.float() - inner.float()
                fused = fuse_one(name, base, new_vector, historical_vector)
                parameter.copy_(fused)
                base.copy_(fused)
            self._inner = {}
        self.num_rounds += 1
        self._empty_scores()
        return Round(
            index=self.num_rounds,
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            outer_loss=outer_loss,
            **details,
        )

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _empty_scores(self) -> None:
        for role, accumulator in self.accumulators.items():
            fate = self.options.new_scores if role == "new" else self.options.historical_scores
            if fate == "emptied":
                accumulator.reset()

    def _adaptive_or_average(self) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
        if self.options.rule == "average":
            return lambda _, base, new, historical: add_vectors(base, new, historical, 0.5, 0.5)
        scores = {role: dict(self.accumulators[role].scores()) for role in self.accumulators}
        bounds = {role: score_bounds(scores[role].values()) for role in scores}

        def fuse_one(name: str, base: Tensor, new: Tensor, historical: Tensor) -> Tensor:
            new_score, historical_score = (
                normalise(scores[role][name], bounds[role]) for role in ("new", "historical")
            )
            return recurrent_kif_adaptive(
                base, new, historical, new_score, historical_score,
                temperature=self.options.temperature,
            )  # fmt: skip

        return fuse_one

    def _masked(
        self, details: dict[str, float | None]
    ) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
        masks = {
            role: select_important(
                accumulator, self.options.important_fraction, self.options.scope, role
            )
            for role, accumulator in self.accumulators.items()
        }
        new_masks, historical_masks = masks["new"].masks, masks["historical"].masks
        details.update(
            new_threshold=masks["new"].threshold,
            historical_threshold=masks["historical"].threshold,
            **overlap_shares(new_masks, historical_masks),
        )

        def fuse_one(name: str, base: Tensor, new: Tensor, historical: Tensor) -> Tensor:
            return recurrent_kif(
                base, new, historical, new_masks[name], historical_masks[name],
                shared_weights=self.options.shared_weights, redundant=self.options.redundant,
            )  # fmt: skip

        return fuse_one

    def state_dict(self) -> dict[str, Tensor]:
        """Both accumulators as ``ROLE/sensitivity/NAME``...; valid between two rounds only.

        Between rounds theta_b is the live parameters, so it need not be kept.
        """
        return {
            f"{role}/{key}": value
            for role, accumulator in self.accumulators.items()
            for key, value in accumulator.state_dict().items()
        }

    def counters(self) -> dict[str, int]:
        """What :meth:`load_state` needs beside the tensors."""
        steps = {f"{role}_steps": a.num_steps for role, a in self.accumulators.items()}
        return {"num_rounds": self.num_rounds, **steps}

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict` and :meth:`counters`, at the live parameters.

        Raises:
            ValueError: tensors of other parameters or shapes.
        """
        expected = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        if expected != found:
            differing = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
            raise ValueError(f"state of other parameters, first at {differing[0]}")
        for role, accumulator in self.accumulators.items():
            part = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{role}/")}
            accumulator.load_state_dict(part, num_steps=counters[f"{role}_steps"])
        self.num_rounds = counters["num_rounds"]
        self._base = self._copy() if self._fuses else {}


@dataclass(frozen=True, slots=True)
class Selected:
    """Masks by parameter name, and the threshold if there was one for all."""

    masks: dict[str, Tensor]
    threshold: float | None


def select_important(
    accumulator: ImportanceAccumulator,
    important_fraction: float,
    scope: Scope,
    role: Role,
) -> Selected:
    """Mark the important parameters of one side; warns when there are none."""
    thresholds: dict[str, Threshold]
    if scope == "global":
        common = importance_threshold(_Scores(accumulator), important_fraction)
        thresholds = dict.fromkeys(accumulator.sensitivity, common)
    else:
        thresholds = {
            name: importance_threshold([scores], important_fraction)
            for name, scores in accumulator.scores()
            if scores.numel()
        }
    if important_fraction > 0 and all(t.is_degenerate for t in thresholds.values()):
        warnings.warn(
            f"the {role} importance scores are all equal: nothing is found important",
            stacklevel=2,
        )
    masks = {name: mask_above(scores, thresholds[name]) for name, scores in accumulator.scores()}
    return Selected(masks, common.value if scope == "global" else None)


def overlap_shares(
    new_masks: Mapping[str, Tensor], historical_masks: Mapping[str, Tensor]
) -> dict[str, float]:
    """Shares of parameters important to both sides, one only, or neither."""
    counts: Sequence[Tensor] = [
        torch.stack([(new & old).sum(), (new & ~old).sum(), (~new & old).sum()])
        for new, old in ((new_masks[name], historical_masks[name]) for name in new_masks)
    ]
    total = sum(mask.numel() for mask in new_masks.values())
    both, new_only, historical_only = (torch.stack(list(counts)).sum(0).double() / total).tolist()
    return {
        "both": both,
        "new_only": new_only,
        "historical_only": historical_only,
        "neither": 1.0 - both - new_only - historical_only,
    }


class _Scores:
    """An accumulator's scores as a re-iterable, so that selection can read them twice."""

    def __init__(self, accumulator: ImportanceAccumulator) -> None:
        self._accumulator = accumulator

    def __iter__(self) -> Iterator[Tensor]:
        return (scores for _, scores in self._accumulator.scores())
