"""What a folder is, where it came from and what it holds, read tensor by tensor."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kifmerge.checkpoint import mask, snapshot, units
from kifmerge.checkpoint.folder import (
    Folder,
    as_folder,
    file_sizes,
    has_file,
    inner_folders,
    is_folder,
)
from kifmerge.checkpoint.provenance import check_format, read_details, read_provenance
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.source import (
    ADAPTER_CONFIG,
    MODEL_STEM,
    FolderSource,
    Source,
    index_name,
    open_source,
)
from kifmerge.errors import CheckpointError
from kifmerge.fusion.fetching import Reading, settle
from kifmerge.fusion.layers import (
    Layer,
    TensorEntry,
    layer_of,
    layer_totals,
    natural_order,
    tensor_entries,
)
from kifmerge.fusion.selection import ScoreStream
from kifmerge.phases.group import unit_figures
from kifmerge.tensor.selection import CHUNK_NUMEL, importance_threshold, mask_above

Kind = Literal[
    "checkpoint",
    "adapter",
    "importance snapshot",
    "skill units",
    "mask",
    "trainer state",
    "run folder",
]

# What tells each kind, in this order: a folder with the first of these is of that kind.
_KIND_FILES: Mapping[str, Kind] = {
    snapshot.DETAIL_FILE: "importance snapshot",
    units.DETAIL_FILE: "skill units",
    mask.DETAIL_FILE: "mask",
    "state.json": "trainer state",
    ADAPTER_CONFIG: "adapter",
    "config.json": "checkpoint",
    index_name(MODEL_STEM): "checkpoint",
    f"{MODEL_STEM}.safetensors": "checkpoint",
    "manifest.json": "run folder",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What was found in a folder.

    Attributes:
        kind: of the folder.
        reference: as it was asked for.
        made_by: the command that made it, with options and parents; None if it is not recorded.
        facts: what else its JSON files say, plain values.
        tensors: in the order of their names; none of skill units.
        layers: likewise.
    """

    kind: Kind
    reference: str
    made_by: Mapping[str, Any] | None
    facts: Mapping[str, Any]
    tensors: Sequence[TensorEntry]
    layers: Sequence[Layer]

    @property
    def total(self) -> Layer:
        """All layers together."""
        layers = self.layers
        num_parameters = sum(layer.num_parameters for layer in layers)
        scores = [(la.mean_score, la.num_parameters) for la in layers if la.mean_score is not None]
        important = [la.num_important for la in layers if la.num_important is not None]
        return Layer(
            "total",
            sum(layer.num_tensors for layer in layers),
            num_parameters,
            sum(layer.num_bytes for layer in layers),
            sum(mean * n for mean, n in scores) / num_parameters if scores else None,
            sum(important) if important else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values; skill units hold no tensors, and have no totals."""
        content = {
            "kind": self.kind,
            "reference": self.reference,
            "made_by": self.made_by,
            "facts": self.facts,
        }
        if self.kind == "skill units":
            return content
        return {
            **content,
            "total": self.total.as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "tensors": [{**asdict(t), "shape": list(t.shape)} for t in self.tensors],
        }


def kind_of(reference: Folder | str) -> Kind:
    """What a folder is, by the files in it.

    Raises:
        CheckpointError: no folder, or nothing in it that is known.
    """
    folder = as_folder(reference)
    if not is_folder(folder):
        found = "a file" if isinstance(folder, Path) and folder.exists() else "nothing"
        raise CheckpointError(f"{reference}: expected a folder, found {found} there")
    for file, kind in _KIND_FILES.items():
        if has_file(folder, file):
            return kind
    found = ", ".join(sorted([*file_sizes(folder), *inner_folders(folder)])[:5]) or "nothing"
    raise CheckpointError(
        f"{reference} is no folder that kifmerge knows: expected one of "
        f"{', '.join(_KIND_FILES)} in it, found {found}"
    )


def inspect_folder(reference: Folder | str, important_fraction: float | str = 0.2) -> Inspection:
    """Read what a checkpoint, adapter, snapshot, mask, trainer state or skill units are and hold.

    Headers are read, and of snapshots and masks the tensors too, one at a time.

    Args:
        reference: the folder.
        important_fraction: of a snapshot or skill units: the share to be found important over the
            whole model.

    Raises:
        CheckpointError: unknown folder, damaged or missing file, newer version.
    """
    directory = as_folder(reference)
    kind = kind_of(directory)
    if kind == "importance snapshot":
        found = _snapshot(directory, important_fraction)
    elif kind == "skill units":
        found = _skill_units(directory, important_fraction)
    elif kind == "run folder":
        raise CheckpointError(f"{reference} is a run folder: kifmerge.run.run_status reads it")
    else:
        found = _READERS[kind](directory)
    made_by, facts, tensors, layers = found
    inside = [f"{name}/" for name in _artifacts_inside(directory)]
    if inside:
        facts = {**facts, "inside": inside}
    return Inspection(
        kind=kind,
        reference=str(reference),
        made_by=made_by,
        facts=facts,
        tensors=sorted(tensors, key=lambda entry: natural_order(entry.name)),
        layers=sorted(layers, key=lambda layer: natural_order(layer.name)),
    )


_Found = tuple[Mapping[str, Any] | None, dict[str, Any], list[TensorEntry], list[Layer]]

# Key in config.json or adapter_config.json -> what it is called here.
_CONFIG_FACTS = {
    "base_model_name_or_path": "base",
    "peft_type": "peft_type",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "modules_to_save": "modules_to_save",
    "architectures": "architectures",
    "model_type": "model_type",
    "quantization_config": "quantization",
}


def _checkpoint(directory: Folder) -> _Found:
    config = read_details(directory / "config.json")
    if config.get("quantization_config"):
        source = FolderSource(directory, MODEL_STEM)  # not to be merged, but to be looked at
    else:
        source = open_source(directory)
    return _described(directory, source, config)


def _adapter(directory: Folder) -> _Found:
    return _described(directory, open_source(directory), read_details(directory / ADAPTER_CONFIG))


def _described(directory: Folder, source: FolderSource, config: Mapping[str, Any]) -> _Found:
    provenance = read_provenance(directory)
    facts = {name: config[key] for key, name in _CONFIG_FACTS.items() if config.get(key)}
    tensors = tensor_entries(source)
    layers = layer_totals(tensors, lambda entry: layer_of(entry.name))
    return provenance.get("made_by"), {**facts, **_facts(provenance)}, tensors, layers


def _facts(details: Mapping[str, Any], *hidden: str) -> dict[str, Any]:
    """What a JSON file says beside its format, its version and how it was made."""
    left_out = ("format", "version", "made_by", *hidden)
    return {key: value for key, value in details.items() if key not in left_out}


def _snapshot(directory: Folder, important_fraction: float | str) -> _Found:
    scores = open_scores(directory)
    _settle(scores.stored, num_passes=3)
    try:
        threshold = importance_threshold(ScoreStream(scores), important_fraction)
    except ValueError as error:
        strange = next(
            (f" in {n}" for n, chunk in _chunks(scores) if bool(chunk.isnan().any())), ""
        )
        raise CheckpointError(
            f"{directory}: no threshold can be found: {error}{strange}"
        ) from error
    sums = _sums(scores, lambda chunk: mask_above(chunk, threshold))
    tensors = tensor_entries(FolderSource(directory, Path(snapshot.TENSOR_FILE).stem))
    layers = layer_totals(tensors, lambda entry: layer_of(entry.name.partition("/")[2]))
    details = read_details(directory / snapshot.DETAIL_FILE)
    important = {
        "fraction": str(important_fraction),
        "scope": "global",
        "threshold": threshold.value,
        "num_important": threshold.num_above,
    }
    facts = {**_facts(details), "important": important}
    return details.get("made_by"), facts, tensors, [sums[la.name].judged(la) for la in layers]


def _skill_units(directory: Folder, important_fraction: float | str) -> _Found:
    found = units.read_units(directory)
    members = [units.parse_member(text) for unit in found.units for text in unit.members]
    facts = {
        **_facts(found.details),
        "num_members": len(members),
        "num_tensors": len({member.tensor for member in members}),
        **unit_figures(found, important_fraction),
    }
    return found.details.get("made_by"), facts, [], []


def _mask(directory: Folder) -> _Found:
    source = mask.MaskSource(directory)
    _settle(source.stored, num_passes=1)
    sums = _sums(source, lambda chunk: chunk)
    tensors = [
        replace(entry, shape=source.info(entry.name).shape, dtype="bit")
        for entry in tensor_entries(FolderSource(directory, mask.STEM))
    ]
    layers = [
        replace(sums[layer.name].judged(layer), mean_score=None)
        for layer in layer_totals(tensors, lambda entry: layer_of(entry.name))
    ]
    return source.details.get("made_by"), _facts(source.details, "shapes"), tensors, layers


def _settle(stored: Source, num_passes: int) -> None:
    if isinstance(stored, FolderSource):
        settle([Reading(source=stored, names=stored.names(), num_passes=num_passes)])


@dataclass(slots=True)
class _Sums:
    """Running figures of the scores, or marks, of one layer."""

    num_values: int = 0
    num_important: int = 0
    score: float = 0.0

    def judged(self, layer: Layer) -> Layer:
        """The layer with these figures."""
        return replace(
            layer,
            num_parameters=self.num_values,
            mean_score=self.score / self.num_values if self.num_values else None,
            num_important=self.num_important,
        )


def _sums(source: Source, marks: Callable[[Tensor], Tensor]) -> dict[str, _Sums]:
    """Figures of each layer, in one pass."""
    sums = {layer_of(name): _Sums() for name in source.names()}
    for name, chunk in _chunks(source):
        layer = sums[layer_of(name)]
        layer.num_values += chunk.numel()
        layer.num_important += int(marks(chunk).sum())
        layer.score += float(chunk.sum(dtype=torch.float64))
    return sums


def _chunks(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, flat chunk) of all tensors."""
    for name in source.names():
        numel = source.info(name).numel
        for start in range(0, numel, CHUNK_NUMEL):
            yield name, source.read(name, start, min(start + CHUNK_NUMEL, numel))


def _state(directory: Folder) -> _Found:
    from kifmerge.training.state import FORMAT, STATE_FILE, VERSION

    details = read_details(directory / STATE_FILE)
    check_format(details, FORMAT, VERSION, directory / STATE_FILE)
    files = fnmatch.filter(file_sizes(directory), "*.safetensors")
    stems = sorted(name.removesuffix(".safetensors") for name in files)
    tensors = [entry for stem in stems for entry in tensor_entries(FolderSource(directory, stem))]
    by_file = layer_totals(tensors, lambda entry: entry.file)
    return details.get("made_by"), _facts(details, "rng"), tensors, by_file


def _artifacts_inside(folder: Folder) -> Iterator[str]:
    for name in inner_folders(folder):
        if not _KIND_FILES.keys().isdisjoint(file_sizes(folder, name)):
            yield name


_READERS: Mapping[Kind, Callable[[Folder], _Found]] = {
    "checkpoint": _checkpoint,
    "adapter": _adapter,
    "mask": _mask,
    "trainer state": _state,
}
