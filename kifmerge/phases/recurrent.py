"""The rounds of Recurrent-KIF over a set of live parameters; knows no Trainer and no data.

One round: inner steps on the new task lead from theta_b to theta_q, outer steps on memory from
there to theta_m; both sides' importance is accumulated on the way; the two task vectors are fused
into theta_{b+1}, in place, and the next round starts there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kifmerge.phases.presets import RecurrentOptions, Role
from kifmerge.tensor.fusion import (
    add_vectors,
    normalise,
    recurrent_kif,
    recurrent_kif_adaptive,
    score_bounds,
)
from kifmerge.tensor.importance import (
    ACCELERATOR_GROUP_NUMEL,
    CPU_GROUP_NUMEL,
    ImportanceAccumulator,
)
from kifmerge.tensor.selection import Scope, Threshold, importance_threshold, mask_above

GroupRule = Callable[[list[str], Tensor, Tensor, Tensor], Tensor]

_ROLES: tuple[Role, Role] = ("new", "historical")


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
            for role in _ROLES:
                self.accumulators[role] = ImportanceAccumulator(
                    parameters, options.importance(role)
                )
        self._parameters = dict(parameters)
        self._fuses = options.rule != "none"
        self._base = self._copy() if self._fuses else {}
        self._inner: dict[str, Tensor] = {}

    def observe(self, role: Role) -> None:
        """Take one step's weights and finite gradients into the importance of ``role``."""
        if role in self.accumulators:
            live = self._parameters.values()
            self.accumulators[role].accumulate(list(live), [p.grad for p in live])

    def begin_outer(self) -> None:
        """Remember theta_q: the inner steps of this round are over."""
        if self._fuses:
            self._inner = self._copy()

    @torch.no_grad()
    def fuse(self, *, inner_steps: int, outer_steps: int, outer_loss: float) -> Round:
        """Replace the live parameters by theta_{b+1} and begin the next round from there."""
        details: dict[str, float | None] = {}
        if self._fuses:
            fuse_group = self._rule(details)
            for names in self._groups():
                parameters = {name: self._parameters[name] for name in names}
                live, base, inner = (
                    _flat(values, names) for values in (parameters, self._base, self._inner)
                )
                new_vector = inner.float() - base.float()
                historical_vector = live.float() - inner.float()
                fused = fuse_group(names, base, new_vector, historical_vector)
                sizes = [parameter.numel() for parameter in parameters.values()]
                for name, part in zip(names, fused.split(sizes), strict=True):
                    parameters[name].copy_(part.view_as(parameters[name]))
                    self._base[name].copy_(parameters[name])
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

    def _groups(self) -> Iterator[list[str]]:
        """Names of parameters small enough to be fused in one go, of one dtype and device.

        Fusion works element by element: many small tensors cost as many calls as one.
        """
        group: list[str] = []
        kind, numel = None, 0
        for name, parameter in self._parameters.items():
            limit = CPU_GROUP_NUMEL if parameter.device.type == "cpu" else ACCELERATOR_GROUP_NUMEL
            full = numel + parameter.numel() > limit
            if group and (full or kind != (parameter.dtype, parameter.device)):
                yield group
                group, numel = [], 0
            group.append(name)
            kind, numel = (parameter.dtype, parameter.device), numel + parameter.numel()
        if group:
            yield group

    def _rule(self, details: dict[str, float | None]) -> GroupRule:
        """The rule as a function of a group's names, flat base and flat task vectors."""
        if self.options.rule == "average":
            return lambda _, base, new, historical: add_vectors(base, new, historical, 0.5, 0.5)
        if self.options.rule == "recurrent-kif":
            return self._masked_rule(details)
        return self._adaptive_rule()

    def _adaptive_rule(self) -> GroupRule:
        scores = {role: dict(self.accumulators[role].scores()) for role in self.accumulators}
        bounds = {role: score_bounds(scores[role].values()) for role in scores}

        def fuse_group(names: list[str], base: Tensor, new: Tensor, historical: Tensor) -> Tensor:
            new_score, historical_score = (
                normalise(_flat(scores[role], names), bounds[role]) for role in _ROLES
            )
            return recurrent_kif_adaptive(
                base, new, historical, new_score, historical_score,
                temperature=self.options.temperature,
            )  # fmt: skip

        return fuse_group

    def _masked_rule(self, details: dict[str, float | None]) -> GroupRule:
        new, historical = (
            select_important(
                self.accumulators[role], self.options.important_fraction, self.options.scope, role
            )
            for role in _ROLES
        )
        details.update(
            new_threshold=new.threshold,
            historical_threshold=historical.threshold,
            **overlap_shares(new.masks, historical.masks),
        )

        def fuse_group(names: list[str], base: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
            return recurrent_kif(
                base, inner, outer, _flat(new.masks, names), _flat(historical.masks, names),
                shared_weights=self.options.shared_weights, redundant=self.options.redundant,
            )  # fmt: skip

        return fuse_group

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
    new, historical = (_flat(masks, list(new_masks)) for masks in (new_masks, historical_masks))
    counts = torch.stack([(new & historical).sum(), new.sum(), historical.sum()])
    both, either_new, either_historical = (counts.double() / new.numel()).tolist()
    new_only, historical_only = either_new - both, either_historical - both
    return {
        "both": both,
        "new_only": new_only,
        "historical_only": historical_only,
        "neither": 1.0 - both - new_only - historical_only,
    }


def _flat(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([values[name].detach().reshape(-1) for name in names])


class _Scores:
    """An accumulator's scores as a re-iterable, so that selection can read them twice."""

    def __init__(self, accumulator: ImportanceAccumulator) -> None:
        self._accumulator = accumulator

    def __iter__(self) -> Iterator[Tensor]:
        return (scores for _, scores in self._accumulator.scores())
