"""Whether checkpoints belong together: one model, one adapter's factors, and who came from whom.

What is refused here would merge without an error into a model that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.provenance import read_details, read_provenance
from kifmerge.checkpoint.source import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    FolderSource,
    Source,
    open_source,
)
from kifmerge.errors import CheckpointError, problem_list

# What an adapter's configuration says of its training, or of the software that wrote it.
_ADAPTER_HISTORY = (
    "auto_mapping", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
    "task_type",
)  # fmt: skip


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
    directory: Path
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


def open_checkpoint(role: str, directory: Path) -> Checkpoint:
    """Open a checkpoint from its headers and its JSON.

    Raises:
        CheckpointError: it cannot be used.
    """
    source = open_source(directory)
    config = read_details(directory / ADAPTER_CONFIG)
    return Checkpoint(role, directory, source, read_provenance(directory), config)


def refuse_differing(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of different models.

    Raises:
        CheckpointError: a model beside an adapter, other names, shapes or dtypes, other labels, or
            adapters of other bases or settings.
    """
    first, *others = checkpoints
    problems: list[str] = []
    for other in others:
        problems += _kind_problems(first, other)
        problems += tensor_problems(first.source, other.source, first.role, other.role)
    if problems:
        folders = ", ".join(f"{c.role} {c.directory}" for c in checkpoints)
        raise CheckpointError(problem_list(f"these are different models ({folders})", problems))


def tensor_problems(first: Source, other: Source, first_role: str, other_role: str) -> list[str]:
    """What differs in names, shapes and dtypes."""
    expected = {name: first.info(name) for name in first.names()}
    found = {name: other.info(name) for name in other.names()}
    return [
        f"{name}: {first_role} {expected.get(name, 'none')}, {other_role} {found.get(name, 'none')}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def _kind_problems(first: Checkpoint, other: Checkpoint) -> list[str]:
    if first.is_adapter != other.is_adapter:
        kinds = {True: "an adapter", False: "a whole model"}
        return [
            f"{first.role} is {kinds[first.is_adapter]}, {other.role} {kinds[other.is_adapter]}"
        ]
    compared = {
        **_differing(_settings(first.adapter_config), _settings(other.adapter_config)),
        **_differing(_meaning(first.provenance), _meaning(other.provenance), both=True),
    }
    return [
        f"{key}: {first.role} {ours!r}, {other.role} {theirs!r}"
        for key, (ours, theirs) in compared.items()
    ]


def _differing(
    first: Mapping[str, Any], other: Mapping[str, Any], *, both: bool = False
) -> dict[str, tuple[Any, Any]]:
    keys = sorted(first.keys() & other.keys() if both else first.keys() | other.keys())
    return {k: (first.get(k), other.get(k)) for k in keys if first.get(k) != other.get(k)}


def _settings(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's factors mean, in a form that compares: lists of modules have no order."""
    settings = {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in adapter_config.items()
        if key not in _ADAPTER_HISTORY and value is not None
    }
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_dir():
        settings["base_model_name_or_path"] = str(Path(base).resolve())
    return settings


def _meaning(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What our own checkpoints say of how their tensors are to be read."""
    model = provenance.get("model")
    meaning = {key: model[key] for key in ("kind", "pooling") if key in model} if model else {}
    return {**meaning, **{key: provenance[key] for key in ("labels",) if key in provenance}}


def is_replayed(historical: Checkpoint, new: Checkpoint) -> bool:
    """Whether ``kifmerge replay`` made one checkpoint from the other, as far as is recorded."""
    role = "adapter" if historical.is_adapter else "model"
    return historical.command == "replay" and _comes_from(historical, role, new)


def _comes_from(child: Checkpoint, role: str, parent: Checkpoint) -> bool:
    digest = child.parents.get(role)
    return digest is not None and digest == parent.source.fingerprint()


def refuse_independent(base: Checkpoint, new: Checkpoint, historical: Checkpoint) -> None:
    """Refuse adapters whose factors have no common basis.

    A LoRA update is B @ A; any invertible R gives the same update as (B R) @ (R^-1 A). Factors of
    two trainings from different starts differ by such an R, and their element-wise mix is no mix
    of the updates. They may be fused where one was trained from the other or, declared by giving
    it as the base, both from one adapter.

    Raises:
        CheckpointError: they are independent, as far as is known.
    """
    if _comes_from(historical, "adapter", new) or _comes_from(new, "adapter", historical):
        return
    hint = (
        "factors of independent adapters have no common basis. Give the adapter that both were "
        "trained from as --base, or insist with --space factor"
    )
    if not base.is_adapter:
        raise CheckpointError(
            f"new {new.directory} and historical {historical.directory} are adapters, "
            f"base {base.directory} is a whole model: {hint}"
        )
    for checkpoint in (new, historical):
        if checkpoint.command == "train" and "adapter" not in checkpoint.parents:
            raise CheckpointError(
                f"{checkpoint.role} {checkpoint.directory} was trained from a fresh adapter, "
                f"not from base {base.directory}: {hint}"
            )


def refuse_other_base(base: Checkpoint, adapter: Checkpoint) -> None:
    """Refuse an adapter that names another folder as its base than the whole model given.

    Raises:
        CheckpointError: naming both.
    """
    named = adapter.adapter_config.get("base_model_name_or_path")
    if isinstance(named, str) and Path(named).is_dir() and not base.directory.samefile(named):
        raise CheckpointError(
            f"{adapter.role} {adapter.directory} is an adapter of {named}, not of {base.directory}"
        )


def refuse_other_evidence(base: Source, evidence: Mapping[str, tuple[Path, Source]]) -> None:
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
