"""A merge that was made before, from the ``kifmerge.json`` of what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.folder import Folder, Folders
from kifmerge.checkpoint.provenance import (
    CHECKPOINT_FORMAT,
    VERSION,
    check_format,
    read_details,
)
from kifmerge.errors import CheckpointError
from kifmerge.fusion.inputs import EVIDENCE_ENDS, MergeInputs
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.merge import MergeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedMerge:
    """What a ``kifmerge.json`` says of the merge that it lies beside.

    Attributes:
        inputs: the folders, as they were given then.
        rule: with its options.
        options: what else was told.
        content: all of the file; its digests are what the merge must come to again.
    """

    inputs: MergeInputs
    rule: FusionOptions
    options: MergeOptions
    content: Mapping[str, Any]


def recorded_merge(path: Path, folders: Folders | None = None) -> RecordedMerge:
    """Read how a merge was made.

    Args:
        path: of a ``kifmerge.json``.
        folders: opens the references in it.

    Raises:
        CheckpointError: no such file, or it tells of no merge, or of one that is not known here.
    """
    content = read_details(path)
    if not content:
        raise CheckpointError(f"{path}: no such file: expected the kifmerge.json of a merge")
    check_format(content, CHECKPOINT_FORMAT, VERSION, path)
    made_by = content.get("made_by")
    if not isinstance(made_by, dict) or made_by.get("command") != "merge":
        raise CheckpointError(f"{path}: what it lies beside was not made by a merge")
    try:
        references = {role: parent["reference"] for role, parent in made_by["parents"].items()}
        options = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in made_by["options"].items()
        }
        of_rule = _named(options, FusionOptions)
        of_merge = _named(options, MergeOptions)
        strange = options.keys() - of_rule.keys() - of_merge.keys()
        if strange:
            raise ValueError(f"{', '.join(sorted(strange))} is not known here")
        rule, further = FusionOptions(**of_rule), MergeOptions(**of_merge)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: a merge that cannot be made again by this version ({error})"
        ) from error
    parents = (folders or Folders()).open_each(references)
    return RecordedMerge(inputs=_inputs(parents), rule=rule, options=further, content=content)


def _named(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in options.items() if key in names}


def _inputs(parents: Mapping[str, Folder]) -> MergeInputs:
    kinds: dict[str, dict[str, Folder]] = {end: {} for end in EVIDENCE_ENDS}
    models = {}
    for role, path in parents.items():
        end = next((end for end in EVIDENCE_ENDS if role.endswith(end)), None)
        if end is not None:
            kinds[end][role.removesuffix(end)] = path
        elif role not in ("base", "config_from"):
            models[role] = path
    importance, masks, units = kinds.values()
    return MergeInputs(
        base=parents.get("base"),
        models=models,
        importance=importance,
        masks=masks,
        units=units,
        config_from=parents.get("config_from"),
    )
