"""Scores of skill units: the mean importance of the members of each.

That of a LoRA rank is the mean over its row of lora_A times the mean over its column of lora_B.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.units import Unit, Units, member_text
from kifmerge.errors import CheckpointError, check_choices, problem_list
from kifmerge.fusion.checked import FiniteSource
from kifmerge.fusion.members import Members, unit_members
from kifmerge.tensor.units import (
    DEFAULT_CUMULATIVE_WEIGHT,
    DEFAULT_NEW_WEIGHT,
    UnitKind,
    cumulative_scores,
    slice_layout,
    slice_sums,
)

OnProgress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """How units are made.

    Attributes:
        unit: their kind.
        new_weight: of the new task's scores in the cumulative ones.
        cumulative_weight: of the cumulative scores before it.
    """

    unit: UnitKind
    new_weight: float = DEFAULT_NEW_WEIGHT
    cumulative_weight: float = DEFAULT_CUMULATIVE_WEIGHT

    def __post_init__(self) -> None:
        """Refuse kinds that do not exist and weights that weigh nothing."""
        check_choices(self)
        weights = (self.new_weight, self.cumulative_weight)
        if not all(0 <= weight <= 1 for weight in weights) or not any(weights):
            raise ValueError(
                f"new and cumulative weight must lie in [0, 1], and not both be 0, found {weights}"
            )


def group_scores(
    scores: Source,
    kind: UnitKind,
    historical: Units | None = None,
    *,
    new_weight: float = DEFAULT_NEW_WEIGHT,
    cumulative_weight: float = DEFAULT_CUMULATIVE_WEIGHT,
    on_progress: OnProgress = lambda num_parameters: None,
    ranks: Ranks = ALONE,
) -> Units:
    """Score the skill units of a model, in one pass and constant memory.

    The result depends on the scores alone, and not on how they are stored or cut.

    Args:
        scores: of all parameters, of a task that has just been learnt.
        kind: of the units.
        historical: units after the task before, with their cumulative scores.
        new_weight: of the new task's scores in the cumulative ones.
        cumulative_weight: of the cumulative scores before it.
        on_progress: told how many parameters have been gone through since it was told last.
        ranks: share the pass, tensor by tensor.

    Raises:
        CheckpointError: scores that are not finite, a LoRA factor without its other half, or
            historical units that are not the same.
    """
    options = GroupOptions(unit=kind, new_weight=new_weight, cumulative_weight=cumulative_weight)
    members = unit_members(scores, kind)
    before = cumulative_before(members, kind, historical, "the historical units")
    return score_units(scores, members, before, options, on_progress, ranks)


def score_units(
    scores: Source,
    members: Members,
    before: Sequence[float] | None,
    options: GroupOptions,
    on_progress: OnProgress,
    ranks: Ranks = ALONE,
) -> Units:
    """As :func:`group_scores` does, of members that are known and the cumulative scores before."""
    kind = options.unit
    means = _unit_scores(scores, members, kind, on_progress, ranks)
    cumulative = cumulative_scores(
        means,
        before,
        new_weight=options.new_weight,
        cumulative_weight=options.cumulative_weight,
    )
    rows = zip(members.items(), means, cumulative, strict=True)
    return Units(
        kind,
        tuple(Unit(name, tuple(map(member_text, of)), s, c) for (name, of), s, c in rows),
    )


def _unit_scores(
    scores: Source, members: Members, kind: UnitKind, on_progress: OnProgress, ranks: Ranks
) -> list[float]:
    """Score of each unit, while the tensors are read in the order of their files."""
    checked = FiniteSource(scores)
    axes = {member.tensor: member.axis for of in members.values() for member in of}
    names = [name for name in scores.names() if name in axes]
    own: dict[str, list[float]] = {}
    for name in ranks.share(names, lambda name: scores.info(name).nbytes):
        shape = scores.info(name).shape
        own[name] = slice_sums(functools.partial(checked.read, name), shape, axes[name])
        on_progress(math.prod(shape))
    sums = {name: found for of_rank in ranks.gather(own) for name, found in of_rank.items()}
    numels = {}
    for name in names:
        outer, _, inner = slice_layout(scores.info(name).shape, axes[name])
        numels[name] = outer * inner
    if kind == "lora-rank":
        return [
            math.prod(sums[m.tensor][m.position] / numels[m.tensor] for m in of)
            for of in members.values()
        ]
    return [
        math.fsum(sums[m.tensor][0] for m in of) / sum(numels[m.tensor] for m in of)
        for of in members.values()
    ]


def cumulative_before(
    members: Members, kind: UnitKind, historical: Units | None, label: str
) -> list[float] | None:
    """Cumulative scores of the same units after the task before; None if there is none.

    Raises:
        CheckpointError: they are not the same units.
    """
    if historical is None:
        return None
    if historical.kind != kind:
        raise CheckpointError(f"{label}: expected units of kind {kind}, found {historical.kind}")
    earlier = {unit.name: unit for unit in historical.units}
    problems = [f"{name}: not among them" for name in members if name not in earlier]
    problems += [f"{name}: among them alone" for name in earlier if name not in members]
    problems += [
        f"{name}: expected members {', '.join(expected)}, found {', '.join(earlier[name].members)}"
        for name, of in members.items()
        if name in earlier
        and {*(expected := [member_text(member) for member in of])} != {*earlier[name].members}
    ]
    if problems:
        heading = f"{label}: expected the units that the scores make, found others"
        raise CheckpointError(problem_list(heading, problems))
    return [earlier[name].cumulative for name in members]
