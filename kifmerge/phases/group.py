"""Grouping: one score for each skill unit of a model, and what it means to all tasks so far.

OUT/units.json   the units, with scores and cumulative scores
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.provenance import is_made, made_by, read_details, refuse_inputs_inside
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.snapshot import DETAIL_FILE as SNAPSHOT_FILE
from kifmerge.checkpoint.source import FolderSource
from kifmerge.checkpoint.units import (
    DETAIL_FILE,
    Units,
    member_text,
    read_units,
    write_units,
)
from kifmerge.errors import CheckpointError
from kifmerge.fusion.fetching import Reading, settle
from kifmerge.fusion.members import unit_members
from kifmerge.fusion.unit_scores import GroupOptions, OnProgress, cumulative_before, score_units
from kifmerge.tensor.units import (
    DEFAULT_IMPORTANT_FRACTION,
    important_units,
)

_NUM_SHOWN = 5
_NUM_PASSES = 2  # a digest of everything, and the means
# Two figures of about twenty characters and what lies around them.
_LINE_BYTES = 100


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
        self._before = cumulative_before(
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
        units = score_units(self._scores, self._members, self._before, self.options, on_progress)
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
