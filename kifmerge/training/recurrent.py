"""The rounds of Recurrent-KIF over a set of live parameters; knows no Trainer and no data.

One round: inner steps on the new task lead from theta_b to theta_q, outer steps on memory from
there to theta_m; both sides' importance is accumulated on the way; the two task vectors are fused
into theta_{b+1}, in place, and the next round starts there.

Parameters may be sharded over processes (``torch.distributed.fsdp.fully_shard``, FSDP2). Every
process then accumulates, copies and fuses the elements that it holds, and only counts are added up:
thresholds and masks are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint.holders import holders_of
from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource, Source
from kifmerge.checkpoint.workers import Workers
from kifmerge.errors import TrainingError
from kifmerge.fusion.evidence import Evidence, evidence_from_scores
from kifmerge.fusion.fuse import ROLES, Overlap, Role, fuse
from kifmerge.fusion.weights import Weights
from kifmerge.models.parameters import reshard
from kifmerge.tensor.importance import ImportanceAccumulator
from kifmerge.tensor.sharding import local_part, part_like, sharded_like
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.shards import Float32Source, marks_of_shards
from kifmerge.training.threads import training_workers


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
    end. Extra memory: four accumulators, float32 unless the options say otherwise, and two copies
    of the parameters.

    Args:
        parameters: that are trained, by name; of a sharded model as they are between two steps,
            which is how :func:`kifmerge.models.parameters.trained_parameters` gives them.
        options: of the loop.
        model: that the parameters belong to; needed where it is sharded, for FSDP2 may go on with
            weights that it has gathered, whatever becomes of its shards.
        fuses: whether rounds are fused here. If not, no copy of the parameters is kept.

    Attributes:
        accumulators: role -> accumulator; empty under rules that need no importance.
        num_rounds: rounds fused so far.
        holders: the processes that the parameters are sharded over; alone if they are not.

    Raises:
        TrainingError: parameters that are sharded over some of the processes only, or without
            their model.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        options: RecurrentOptions,
        *,
        model: torch.nn.Module | None = None,
        fuses: bool = True,
    ) -> None:
        self.options = options
        self.num_rounds = 0
        self.accumulators: dict[Role, ImportanceAccumulator] = {}
        self._fuses = fuses and options.rule != "none"
        if options.rule != "none" and options.fusion.needs != "nothing":
            for role in ROLES:
                self.accumulators[role] = ImportanceAccumulator(
                    parameters, options.importance(role)
                )
        self._parameters = dict(parameters)
        self.holders = holders_of(self._parameters)
        self._model = model
        if self.holders.size > 1 and model is None:
            raise TrainingError("the parameters are sharded: RecurrentRounds needs their model too")
        self._base: dict[str, Tensor] = {}
        self._inner: dict[str, Tensor] = {}
        self._begin_round()

    def observe(self, role: Role) -> None:
        """Take one step's weights and finite gradients into the importance of ``role``."""
        if role not in self.accumulators:
            return
        live = self._parameters.values()
        with training_workers(live) as workers:
            self.accumulators[role].accumulate(
                list(live), [p.grad for p in live], spread=workers.map
            )

    def begin_outer(self) -> None:
        """Remember theta_q: the inner steps of this round are over."""
        if self._fuses:
            self._copy_to(self._inner)

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
        if self._model is not None:
            reshard(self._model)
        live = self._live()
        with training_workers(live.values()) as workers:
            evidence = self._evidence(workers)
            weights = Weights(
                base=MemorySource(self._base),
                models=[MemorySource(self._inner), MemorySource(live)],
                parents=[None, 0],
                nonfinite="keep",  # the guard has looked at every gradient
            )
            sink = MemorySink(live)
            counted = self.holders.share(live, lambda name: live[name].nbytes)
            others = [name for name in live if name not in {*counted}]
            fuse(others, weights, evidence, fusion, sink, workers=workers)
            own = fuse(counted, weights, evidence, fusion, sink, workers=workers)
            sink.commit()
        self._begin_round()
        overlap = Overlap()
        for found in self.holders.gather((own.counts, own.num_marked)):
            overlap.add(Overlap(*found))
        thresholds = {f"{role}_threshold": evidence.thresholds.get(role) for role in ROLES}
        return {**thresholds, **overlap.shares()}

    def _evidence(self, workers: Workers) -> Evidence:
        """Masks or scores of both sides, as the rule needs them."""
        fusion = self.options.fusion
        scores: dict[str, Source] = {role: self.scores(role) for role in self.accumulators}
        if self.holders.size > 1 and (fusion.needs, fusion.scope) == ("masks", "tensor"):
            names = [name for name, parameter in self._parameters.items() if parameter.numel()]
            return marks_of_shards(scores, names, fusion.important_fraction, workers, self.holders)
        return evidence_from_scores(scores, fusion, workers, self.holders)

    def scores(self, role: Role) -> Scores:
        """The scores of one side as they are now; of rules that need importance."""
        accumulator = self.accumulators[role]
        kept: Source = MemorySource(accumulator.state_dict())
        if not accumulator.is_as_parameters:
            kept = Float32Source(kept, {n: p.device for n, p in self._parameters.items()})
        return Scores(kept, accumulator.options.score)

    def _live(self) -> dict[str, Tensor]:
        return {name: local_part(p).detach() for name, p in self._parameters.items()}

    def _begin_round(self) -> None:
        """Take theta_b from the live parameters."""
        if self._fuses:
            self._copy_to(self._base)

    def _copy_to(self, copy: dict[str, Tensor]) -> None:
        """Copy the live parameters, into memory that is kept: new memory costs more than a copy."""
        live = self._live()
        if not copy:
            copy.update({name: torch.empty_like(value) for name, value in live.items()})
        with training_workers(live.values()) as workers:
            for _ in workers.map(lambda name: copy[name].copy_(live[name]), live):
                pass

    def empty_scores(self) -> None:
        """Forget the scores that do not outlast a round."""
        with training_workers(self._live().values()):
            for role, accumulator in self.accumulators.items():
                fate = self.options.new_scores if role == "new" else self.options.historical_scores
                if fate == "emptied":
                    accumulator.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Both accumulators as ``ROLE/sensitivity/NAME``...; valid between two rounds only.

        Between rounds theta_b is the live parameters, so it need not be kept. What belongs to a
        sharded parameter is sharded likewise: a DTensor, as ``torch.distributed.checkpoint`` saves
        and loads them.
        """
        return {
            f"{role}/{key}": sharded_like(value, self._parameters[_name(key)])
            for role, accumulator in self.accumulators.items()
            for key, value in accumulator.state_dict().items()
        }

    def counters(self) -> dict[str, int]:
        """What :meth:`load_state` needs beside the tensors."""
        steps = {f"{role}_steps": a.num_steps for role, a in self.accumulators.items()}
        return {"num_rounds": self.num_rounds, **steps}

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict` and :meth:`counters`, at the live parameters.

        Args:
            tensors: whole ones, or sharded as the parameters are.
            counters: beside them.

        Raises:
            ValueError: tensors of other parameters or shapes.
        """
        expected = {
            f"{role}/{key}"
            for role, accumulator in self.accumulators.items()
            for key in accumulator.state_dict()
        }
        differing = sorted(expected ^ {*tensors})
        if differing:
            raise ValueError(f"state of other parameters, first at {differing[0]}")
        for role, accumulator in self.accumulators.items():
            for key, own in accumulator.state_dict().items():
                value, parameter = tensors[f"{role}/{key}"], self._parameters[_name(key)]
                if value.shape != parameter.shape:
                    raise ValueError(f"state of other parameters, first at {role}/{key}")
                own.copy_(part_like(value, parameter))
            accumulator.num_steps = counters[f"{role}_steps"]
        self.num_rounds = counters["num_rounds"]
        self._begin_round()


def _name(key: str) -> str:
    """The parameter of an accumulator ``KIND/NAME``."""
    return key.partition("/")[2]
