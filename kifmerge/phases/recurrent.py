"""The rounds of Recurrent-KIF over a set of live parameters; knows no Trainer and no data.

One round: inner steps on the new task lead from theta_b to theta_q, outer steps on memory from
there to theta_m; both sides' importance is accumulated on the way; the two task vectors are fused
into theta_{b+1}, in place, and the next round starts there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource
from kifmerge.phases.evidence import evidence_from_scores
from kifmerge.phases.fuse import ROLES, fuse
from kifmerge.phases.presets import RecurrentOptions, Role
from kifmerge.phases.weights import Weights
from kifmerge.tensor.importance import ImportanceAccumulator


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
        self._fuses = options.rule != "none"
        if self._fuses and options.fusion.needs != "nothing":
            for role in ROLES:
                self.accumulators[role] = ImportanceAccumulator(
                    parameters, options.importance(role)
                )
        self._parameters = dict(parameters)
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
        details = self._fuse_in_place() if self._fuses else {}
        self.num_rounds += 1
        self.empty_scores()
        return Round(
            index=self.num_rounds,
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            outer_loss=outer_loss,
            **details,
        )

    def _fuse_in_place(self) -> dict[str, float | None]:
        """Write theta_{b+1} over the live parameters and theta_b; what is to be told of it."""
        fusion = self.options.fusion
        evidence = evidence_from_scores({r: self.scores(r) for r in self.accumulators}, fusion)
        weights = Weights(
            base=MemorySource(self._base),
            models=[MemorySource(self._inner), MemorySource(self._parameters)],
            parents=[None, 0],
            nonfinite="keep",  # the guard has looked at every gradient
        )
        sink = MemorySink(self._parameters)
        overlap = fuse(self._parameters, weights, evidence, fusion, sink)
        sink.commit()
        torch._foreach_copy_(list(self._base.values()), list(self._parameters.values()))
        self._inner = {}
        thresholds = {f"{role}_threshold": evidence.thresholds.get(role) for role in ROLES}
        return {**thresholds, **overlap.shares()}

    def scores(self, role: Role) -> Scores:
        """The scores of one side as they are now; of rules that need importance."""
        accumulator = self.accumulators[role]
        return Scores(MemorySource(accumulator.state_dict()), accumulator.options.score)

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def empty_scores(self) -> None:
        """Forget the scores that do not outlast a round."""
        for role, accumulator in self.accumulators.items():
            fate = self.options.new_scores if role == "new" else self.options.historical_scores
            if fate == "emptied":
                accumulator.reset()

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
