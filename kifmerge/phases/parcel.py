"""What of a folder on this disk is published: what belongs to the artifact in it, found sound."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kifmerge.checkpoint import mask, snapshot, units
from kifmerge.checkpoint.journal import unfinished_folder
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.checkpoint.source import FolderSource, index_name, open_source
from kifmerge.checkpoint.units import read_units
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.phases.inspect import Kind, kind_of

CARD_FILE = "README.md"
IMPORTANCE_FOLDER = "importance"
_TEMPLATE_FOLDER = "additional_chat_templates"
# Configurations, vocabularies in any of their forms, chat templates and code.
_COMPANIONS = (
    "*.json", "*.txt", "*.jinja", "*.model", "*.model.*", "*.spm", "*.bpe", "*.codes", "*.tiktoken",
    "*.py",
)  # fmt: skip
_PAPERS = (CARD_FILE, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# The first that fits tells why a file stays here.
_REASONS = {
    ".*": "hidden",
    "*.safetensors": "weights that are no part of it",
    "*.index.json": "an index of weights that are no part of it",
    "trainer_state.json": "what a training goes on from",
    "recurrent.json": "what a training goes on from",
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack"),
        "weights or data in a format that may run code or that kifmerge does not know",
    ),
    "*.lock": "a lock",
}
_UNKNOWN = "not known to belong to it"
_UNFINISHED = re.compile(r"\.unfinished-.*|\..*\.unfinished|.*\.[0-9a-f]{12}\.training")
_FOLDER_REASONS = {
    ".*": "hidden",
    "state": "what a training goes on from",
    "*.training": "an interrupted training",
}
_OTHER_KINDS: Mapping[str, str] = {
    "trainer state": "the state of a training, which nobody else can use: publish the checkpoint "
    "beside it",
    "run folder": "a whole run: publish one of the folders called checkpoint in it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What is going to be published.

    Attributes:
        directory: the folder.
        kind: of the artifact.
        files: path in the folder -> bytes, in the order in which they are told.
        left_out: path in the folder -> why it stays here; folders end with a slash.
        sha256: path -> SHA-256 that is recorded of a file.
        details: content of the JSON that describes the artifact: ``kifmerge.json``, or that of a
            snapshot, mask or skill units; empty where there is none.
    """

    directory: Path
    kind: Kind
    files: Mapping[str, int]
    left_out: Mapping[str, str]
    sha256: Mapping[str, str]
    details: Mapping[str, Any]


def open_parcel(directory: Path) -> Parcel:
    """Find out what of a folder belongs to its artifact, and that it fits together.

    Headers and JSON are read; the contents of weights are not.

    Raises:
        CheckpointError: nothing that is published, half of something, or damaged files.
    """
    _refuse_unfinished(directory)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise CheckpointError(f"{directory}: expected a folder on this disk, found {found}")
    kind = kind_of(directory)
    if kind in _OTHER_KINDS:
        raise CheckpointError(f"{directory} is {_OTHER_KINDS[kind]}")
    weights, details = _OPENERS[kind](directory)
    is_model = kind in ("checkpoint", "adapter")
    chosen = _choose(directory, weights, with_companions=is_model)
    if is_model:
        chosen |= _importance(directory)
    records = _records(chosen, details, directory) if is_model else {}
    return Parcel(
        directory=directory,
        kind=kind,
        files={name: path.stat().st_size for name, path in chosen.items()},
        left_out=dict(_left_out(directory, chosen)),
        sha256=records,
        details=details,
    )


def _refuse_unfinished(directory: Path) -> None:
    path = directory.resolve()
    inside = next((p for p in (path, *path.parents) if _UNFINISHED.fullmatch(p.name)), None)
    if inside is not None:
        raise CheckpointError(
            f"{directory} lies in {inside}, which is unfinished work: finish it, and publish what "
            "comes of it"
        )
    beside = unfinished_folder(directory)
    if beside.exists():
        raise CheckpointError(
            f"{directory} is being made anew, or a command that makes it was interrupted: finish "
            f"it with --resume, or remove {beside}"
        )


_Opened = tuple[list[str], Mapping[str, Any]]


def _model(directory: Path) -> _Opened:
    source = open_source(directory)
    return _weight_files(source), read_provenance(directory)


def _snapshot(directory: Path) -> _Opened:
    found = read_snapshot(directory)
    return [*_weight_files(found.source), snapshot.DETAIL_FILE], found.details


def _mask(directory: Path) -> _Opened:
    details = MaskSource(directory).details
    return [*_weight_files(FolderSource(directory, mask.STEM)), mask.DETAIL_FILE], details


def _units(directory: Path) -> _Opened:
    found = read_units(directory)
    return [units.DETAIL_FILE], {"kind": found.kind, **found.details}


_OPENERS: Mapping[str, Callable[[Path], _Opened]] = {
    "checkpoint": _model,
    "adapter": _model,
    "importance snapshot": _snapshot,
    "mask": _mask,
    "skill units": _units,
}


def _weight_files(source: FolderSource) -> list[str]:
    index = index_name(source.stem)
    is_sharded = f"{source.stem}.safetensors" not in source.files
    return [*source.files, *([index] if is_sharded else [])]


def _choose(directory: Path, weights: Iterable[str], *, with_companions: bool) -> dict[str, Path]:
    """Name -> path: weights, and what belongs beside them."""
    chosen = {name: directory / name for name in weights}
    patterns = (*_PAPERS, *(_COMPANIONS if with_companions else ()))
    for path in sorted(directory.iterdir()):
        if path.is_file() and _fits(path.name, patterns) and _reason(path.name) is None:
            chosen[path.name] = path
    templates = directory / _TEMPLATE_FOLDER
    if with_companions and templates.is_dir():
        chosen |= {f"{_TEMPLATE_FOLDER}/{p.name}": p for p in sorted(templates.glob("*.jinja"))}
    return chosen


def _importance(directory: Path) -> dict[str, Path]:
    """The snapshot that a training has left beside its checkpoint."""
    inner = directory / IMPORTANCE_FOLDER
    if not (inner / snapshot.DETAIL_FILE).is_file():
        return {}
    return {f"{IMPORTANCE_FOLDER}/{name}": inner / name for name in _snapshot(inner)[0]}


def _records(
    chosen: Mapping[str, Path], provenance: Mapping[str, Any], directory: Path
) -> dict[str, str]:
    """SHA-256 of the files that ``kifmerge.json`` tells of, which have the size that it tells."""
    problems, found = [], {}
    try:
        for name, record in provenance.get("files", {}).items():
            found[name] = str(record["sha256"])
            size = chosen[name].stat().st_size if name in chosen else None
            if size != record["bytes"]:
                told = "nothing" if size is None else f"{size} bytes"
                problems.append(f"{name}: expected {record['bytes']} bytes, found {told}")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / PROVENANCE_FILE}: files: expected sha256 and bytes of each file"
        ) from error
    if problems:
        heading = f"{directory} is not what its {PROVENANCE_FILE} says (see kifmerge verify)"
        raise CheckpointError(problem_list(heading, problems))
    return found


def _left_out(directory: Path, chosen: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield (path, why) of what lies in the folder and is not chosen."""
    for path in sorted(directory.iterdir()):
        inside = [name for name in chosen if name.startswith(f"{path.name}/")]
        if path.is_dir():
            if not inside:
                yield f"{path.name}/", _folder_reason(path.name)
            elif len(inside) < sum(1 for _ in path.iterdir()):
                others = {one.name for one in path.iterdir()} - {Path(n).name for n in inside}
                for name in sorted(others):
                    yield f"{path.name}/{name}", _reason(name) or _UNKNOWN
        elif path.name not in chosen:
            yield path.name, _reason(path.name) or _UNKNOWN


def _reason(name: str) -> str | None:
    return next((why for pattern, why in _REASONS.items() if fnmatch.fnmatch(name, pattern)), None)


def _folder_reason(name: str) -> str:
    found = (why for pattern, why in _FOLDER_REASONS.items() if fnmatch.fnmatch(name, pattern))
    return next(found, "a folder of its own")


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
