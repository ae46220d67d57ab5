"""Whether checkpoints belong together: one model, one adapter's factors, and who came from whom.

What is refused here would merge without an error into a model that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.provenance import read_details, read_provenance
from kifmerge.checkpoint.source import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    FolderSource,
    Source,
    open_source,
)
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.reference import Reference, parse_reference


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint and what is known of it.

    Attributes:
        role: what it is called in messages: base, new, historical.
        directory: its folder.
        source: its tensors.
        provenance: its ``kifmerge.json``; empty if it is not ours.
        adapter_config: of an adapter; empty for a whole model.
    """

    role: str
    directory: Folder
    source: FolderSource
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter rather than a whole model."""
        return self.source.stem == ADAPTER_STEM

    @property
    def parents(self) -> Mapping[str, str | None]:
        """Digests of what a command of ours made it from, by role; empty if that is not known."""
        made_by = self.provenance.get("made_by")
        found = made_by.get("parents") if isinstance(made_by, dict) else None
        parents = found if isinstance(found, dict) else {}
        return {role: p.get("digest") for role, p in parents.items() if isinstance(p, dict)}

    @property
    def command(self) -> str | None:
        """The command of ours that made it, if one did."""
        made_by = self.provenance.get("made_by")
        return made_by.get("command") if isinstance(made_by, dict) else None


def open_checkpoint(role: str, directory: Folder) -> Checkpoint:
    """Open a checkpoint from its headers and its JSON.

    Raises:
        CheckpointError: it cannot be used.
    """
    source = open_source(directory)
    config = read_details(directory / ADAPTER_CONFIG)
    return Checkpoint(role, directory, source, read_provenance(directory), config)


def is_replayed(historical: Checkpoint, new: Checkpoint) -> bool:
    """Whether ``kifmerge replay`` made one checkpoint from the other, as far as is recorded."""
    role = "adapter" if historical.is_adapter else "model"
    return historical.command == "replay" and _comes_from(historical, role, new)


def _comes_from(child: Checkpoint, role: str, parent: Checkpoint) -> bool:
    digest = child.parents.get(role)
    return digest is not None and digest == parent.source.fingerprint()


def refuse_independent(base: Checkpoint | None, models: Sequence[Checkpoint]) -> None:
    """Refuse adapters whose factors have no common basis.

    A LoRA update is B @ A; any invertible R gives the same update as (B R) @ (R^-1 A). Factors of
    two trainings from different starts differ by such an R, and their element-wise mix is no mix
    of the updates. They may be fused where each was trained from another one of them or, declared
    by giving it as the base, all from one adapter.

    Args:
        base: an adapter, a whole model, or none.
        models: adapters, two or more.

    Raises:
        CheckpointError: they are independent, as far as is known.
    """
    if _is_one_family(models):
        return
    hint = (
        "factors of independent adapters have no common basis. Give the adapter that "
        f"{'both' if len(models) == 2 else 'all'} were trained from as --base, or insist with "
        "--space factor"
    )
    if base is None or not base.is_adapter:
        adapters = " and ".join(f"{model.role} {model.directory}" for model in models)
        given = "no base" if base is None else f"base {base.directory} is a whole model"
        raise CheckpointError(f"{adapters} are adapters, {given}: {hint}")
    for model in models:
        if model.command == "train" and "adapter" not in model.parents:
            raise CheckpointError(
                f"{model.role} {model.directory} was trained from a fresh adapter, "
                f"not from base {base.directory}: {hint}"
            )


def _is_one_family(models: Sequence[Checkpoint]) -> bool:
    """Whether training leads from each of the adapters to each other, one way or the other."""
    family, strangers = [models[0]], list(models[1:])
    for known in family:  # which grows on the way
        relatives = [
            other
            for other in strangers
            if _comes_from(other, "adapter", known) or _comes_from(known, "adapter", other)
        ]
        family += relatives
        strangers = [other for other in strangers if other not in relatives]
    return not strangers


def refuse_other_base(base: Checkpoint, adapter: Checkpoint) -> None:
    """Refuse an adapter that names another folder as its base than the whole model given.

    Raises:
        CheckpointError: naming both.
    """
    named = adapter.adapter_config.get("base_model_name_or_path")
    if isinstance(named, str) and _is_other(named, base.directory):
        raise CheckpointError(
            f"{adapter.role} {adapter.directory} is an adapter of {named}, not of {base.directory}"
        )


def _is_other(named: str, folder: Folder) -> bool:
    """Whether a base that an adapter names is surely another; a copy elsewhere may be the same."""
    if isinstance(folder, Path):
        return Path(named).is_dir() and not folder.samefile(named)
    reference = parse_reference(named)
    return isinstance(reference, Reference) and reference.repo_id != folder.reference.repo_id


def refuse_other_evidence(base: Source, evidence: Mapping[str, tuple[Folder, Source]]) -> None:
    """Refuse snapshots or masks that are not of the base's model, or not of the same parameters.

    Args:
        base: the model.
        evidence: role -> folder and source.

    Raises:
        CheckpointError: up to ten names or shapes that differ.
    """
    shapes = {name: base.info(name).shape for name in base.names()}
    (_, (first_dir, first)), *others = evidence.items()
    for directory, source in evidence.values():
        problems = [
            f"{name}: {list(source.info(name).shape)}, "
            + (f"the model has {list(shapes[name])}" if name in shapes else "not in the model")
            for name in source.names()
            if shapes.get(name) != source.info(name).shape
        ]
        problems += [
            f"{name}: {base.info(name)} is not a floating-point tensor"
            for name in source.names()
            if name in shapes and not base.info(name).dtype.is_floating_point
        ]
        if problems:
            raise CheckpointError(problem_list(f"{directory} is of another model", problems))
    for _, (directory, source) in others:
        differing = sorted(set(first.names()) ^ set(source.names()))
        if differing:
            raise CheckpointError(
                problem_list(
                    f"{first_dir} and {directory} are of different parameters",
                    [f"{name} is in one of them only" for name in differing],
                )
            )
