"""Grouping: one score for each skill unit of a model, and what it means to all tasks so far.

The score of a unit is the mean importance of its members; that of a LoRA rank the mean over its row
of lora_A times the mean over its column of lora_B.

OUT/units.json   the units, with scores and cumulative scores
"""

from __future__ import annotations

import functools
import heapq
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.provenance import is_made, made_by, read_details, refuse_inputs_inside
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.snapshot import DETAIL_FILE as SNAPSHOT_FILE
from kifmerge.checkpoint.source import FolderSource, Source
from kifmerge.checkpoint.units import (
    DETAIL_FILE,
    Unit,
    Units,
    member_text,
    read_units,
    write_units,
)
from kifmerge.errors import CheckpointError, check_choices, problem_list
from kifmerge.phases.checked import FiniteSource
from kifmerge.phases.fetching import Reading, settle
from kifmerge.phases.members import Members, unit_members
from kifmerge.tensor.units import (
    DEFAULT_CUMULATIVE_WEIGHT,
    DEFAULT_IMPORTANT_FRACTION,
    DEFAULT_NEW_WEIGHT,
    UnitKind,
    cumulative_scores,
    important_units,
    slice_layout,
    slice_sums,
)

OnProgress = Callable[[int], None]

_NUM_SHOWN = 5
_NUM_PASSES = 2  # a digest of everything, and the means
# Two figures of about twenty characters and what lies around them.
_LINE_BYTES = 100


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
    before = _cumulative_before(members, kind, historical, "the historical units")
    return _grouped(scores, members, before, options, on_progress, ranks)


def _grouped(
    scores: Source,
    members: Members,
    before: Sequence[float] | None,
    options: GroupOptions,
    on_progress: OnProgress,
    ranks: Ranks = ALONE,
) -> Units:
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


def _cumulative_before(
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


def unit_figures(
    units: Units, important_fraction: float | str = DEFAULT_IMPORTANT_FRACTION
) -> dict[str, Any]:
    """What is told of units: how many, how many would be important, those that score highest."""
    sides = {
        "score": [unit.score for unit in units.units],
        "cumulative": [unit.cumulative for unit in units.units],
    }
    numbers = {side: sum(important_units(s, important_fraction)) for side, s in sides.items()}
    first = heapq.nlargest(_NUM_SHOWN, units.units, key=lambda unit: unit.score)
    return {
        "unit": units.kind,
        "num_units": len(units.units),
        "important": {"fraction": important_fraction, **numbers},
        "top_units": [
            {"name": unit.name, "score": unit.score, "cumulative": unit.cumulative}
            for unit in first
        ],
    }


class Group:
    """A grouping whose inputs have been opened and found to belong together.

    Args:
        importance: folder of the snapshot of the new task.
        options: how units are made.
        historical_units: folder of the units after the task before; None for the first task.

    Raises:
        CheckpointError: an input that cannot be used, or that does not belong to the other.
    """

    def __init__(
        self, importance: Folder, options: GroupOptions, *, historical_units: Folder | None = None
    ) -> None:
        self.options = options
        self._importance = importance
        self._historical_units = historical_units
        self._scores = open_scores(importance)
        historical = None if historical_units is None else read_units(historical_units)
        try:
            self._members = unit_members(self._scores, options.unit)
        except CheckpointError as error:
            raise CheckpointError(f"{importance}: {error}") from error
        stored = self._scores.stored
        if isinstance(stored, FolderSource):
            settle([Reading(source=stored, names=stored.names(), num_passes=_NUM_PASSES)])
        self._before = _cumulative_before(
            self._members, options.unit, historical, str(historical_units)
        )

    def plan(self) -> dict[str, Any]:
        """Units, passes, bytes to read and about those to write, known from headers alone."""
        infos = [self._scores.info(name) for name in self._scores.names()]
        texts = [(name, *map(member_text, of)) for name, of in self._members.items()]
        return {
            "num_tensors": len(infos),
            "num_parameters": sum(info.numel for info in infos),
            "num_units": len(texts),
            "importance_passes": _NUM_PASSES,
            "read_bytes": _NUM_PASSES * self._scores.num_bytes,
            "write_bytes": sum(_LINE_BYTES + sum(map(len, line)) for line in texts),
        }

    def run(
        self,
        out_dir: Path,
        *,
        overwrite: bool = False,
        on_progress: OnProgress = lambda num_parameters: None,
    ) -> tuple[dict[str, Any], bool]:
        """Make the units.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input.
            CheckpointError: NaN or infinity among the scores.
        """
        refuse_inputs_inside(out_dir, self._parents().values())
        digests = {"importance": self._scores.fingerprint()}
        wanted = made_by("group", asdict(self.options), self._parents(), digests)
        if is_made(out_dir, DETAIL_FILE, wanted, overwrite=overwrite):
            return unit_figures(read_units(out_dir)), False
        units = _grouped(self._scores, self._members, self._before, self.options, on_progress)
        with whole_folder(out_dir, overwrite=overwrite) as temporary:
            write_units(temporary, units, self._details(wanted))
        if len({unit.score for unit in units.units}) == 1:
            warnings.warn("the scores of all units are equal: no unit is important", stacklevel=2)
        return unit_figures(units), True

    def _parents(self) -> dict[str, Folder | None]:
        return {"importance": self._importance, "historical_units": self._historical_units}

    def _details(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        found = read_details(self._importance / SNAPSHOT_FILE)
        known = {key: found[key] for key in ("task", "role") if found.get(key) is not None}
        weights = {key: asdict(self.options)[key] for key in ("new_weight", "cumulative_weight")}
        return {
            **known,
            **({} if self._before is None else weights),
            "snapshot_digest": wanted["parents"]["importance"]["digest"],
            "made_by": wanted,
        }
