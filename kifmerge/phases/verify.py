"""Whether a folder is sound: its files fit each other, hold numbers, and are the ones recorded.

Every byte of the weights is read once, in constant memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kifmerge.checkpoint import mask, snapshot, units
from kifmerge.checkpoint.digest import stem_of
from kifmerge.checkpoint.header import bytes_of
from kifmerge.checkpoint.pieces import Range
from kifmerge.checkpoint.provenance import (
    PROVENANCE_FILE,
    check_format,
    read_details,
    read_provenance,
)
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.source import FolderSource
from kifmerge.checkpoint.workers import Workers, worker_pool
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.phases.parents import Parent, compare_parents

OnProgress = Callable[[int], None]

_STATE_FILE, _MANIFEST_FILE = "state.json", "manifest.json"
_OWN_FILES = (
    PROVENANCE_FILE, mask.DETAIL_FILE, snapshot.DETAIL_FILE, units.DETAIL_FILE, _STATE_FILE,
    _MANIFEST_FILE,
)  # fmt: skip
_INDEX_ENDING = ".safetensors.index.json"
# JSON of a checkpoint that holds an object; others may hold anything.
_OBJECT_FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_RANGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedFile:
    """A file of weights and what was found in it.

    Attributes:
        file: its path in the folder.
        num_tensors: in it.
        num_bytes: size.
        num_nonfinite: elements that are NaN or infinite; None if it could not be read.
        sha256: whether it is the recorded file.
    """

    file: str
    num_tensors: int
    num_bytes: int
    num_nonfinite: int | None
    sha256: Literal["same", "other", "not recorded"]


@dataclass(slots=True, kw_only=True)
class Verification:
    """What was found in a folder.

    Attributes:
        reference: the folder.
        is_ours: whether a command of ours left its record there. In another folder only structure
            and finiteness can be judged.
        files: all files of weights that are part of something.
        parents: what the folder was made from.
        notes: what is worth knowing, and no fault.
        problems: what is wrong.
    """

    reference: str
    is_ours: bool
    files: list[VerifiedFile] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "is_sound": not self.problems}

    def refuse_problems(self) -> None:
        """Raise what is wrong.

        Raises:
            CheckpointError: up to ten problems.
        """
        if self.problems:
            raise CheckpointError(problem_list(f"{self.reference} is not sound", self.problems))


def weight_bytes(reference: str) -> int:
    """Bytes of weights that :func:`verify_folder` is to read of a folder."""
    found = [path for folder in _folders(Path(reference)) for path in folder.glob("*.safetensors")]
    return sum(path.stat().st_size for path in found if path.is_file())


def verify_folder(
    reference: str,
    *,
    num_workers: int | None = None,
    on_progress: OnProgress = lambda num_bytes: None,
    say: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Read a folder, and the folders in it, and judge them.

    Args:
        reference: checkpoint, adapter, snapshot, mask, units, state or run, or any other folder
            with safetensors files.
        num_workers: threads; None: one per processor.
        on_progress: told the bytes of weights read after each piece.
        say: told before something long that no progress is told of.

    Raises:
        CheckpointError: no folder, or nothing in it that could be verified.
    """
    root = Path(reference)
    if not root.is_dir():
        raise CheckpointError(f"{reference}: no such folder")
    is_ours = any((root / name).exists() for name in _OWN_FILES)
    found = Verification(reference=reference, is_ours=is_ours)
    with worker_pool(num_workers) as workers:
        reading = _Reading(root, found, workers, on_progress)
        for directory in _folders(root):
            reading.verify(directory)
    found.problems = list(dict.fromkeys(found.problems))
    if not (is_ours or found.files or found.problems):
        names = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{reference} holds nothing to verify: found {names}")
    if not is_ours:
        found.notes.append("no command of kifmerge made this folder: nothing is recorded of it")
    found.parents = list(compare_parents([root / name for name in _OWN_FILES], say))
    return found


class _Reading:
    """Goes through folders, and gathers what it finds."""

    def __init__(
        self, root: Path, found: Verification, workers: Workers, on_progress: OnProgress
    ) -> None:
        self._root = root
        self._found = found
        self._workers = workers
        self._on_progress = on_progress

    def verify(self, directory: Path) -> None:
        """Read one folder."""
        for path in sorted(directory.glob("*.json")):
            try:
                _read_json(path)
            except CheckpointError as error:
                self._found.problems.append(str(error))
        records = self._records(directory)
        present = {path.name for path in directory.glob("*.safetensors")}
        indexed = {path.name for path in directory.glob(f"*{_INDEX_ENDING}")}
        stems = {stem_of(name) for name in present}
        used: set[str] = set()
        for stem in sorted(stems | {name.removesuffix(_INDEX_ENDING) for name in indexed}):
            try:
                source = FolderSource(directory, stem)
            except CheckpointError as error:
                self._found.problems.append(str(error))
                used |= {name for name in present if stem_of(name) == stem}
                continue
            used |= source.files.keys()
            for file in source.files:
                self._verify_file(source, file, records.get(file))
        self._compare_names(directory, records, present, used)

    def _records(self, directory: Path) -> dict[str, _Record]:
        """What ``kifmerge.json`` says of the weight files, as far as it can be read."""
        path = directory / PROVENANCE_FILE
        try:
            entries = read_details(path).get("files", {})
        except CheckpointError:
            return {}  # which is a problem already
        try:
            return {n: _Record(str(e["sha256"]), int(e["bytes"])) for n, e in entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            self._found.problems.append(f"{path}: files: expected sha256 and bytes of each file")
            return {}

    def _compare_names(
        self, directory: Path, records: Mapping[str, _Record], present: set[str], used: set[str]
    ) -> None:
        recorded_stems = {stem_of(name) for name in records}
        for name in sorted(records.keys() - present):
            text = f"{directory / name}: missing, though {PROVENANCE_FILE} lists it"
            self._found.problems.append(text)
        for name in sorted(present - records.keys()):
            if stem_of(name) in recorded_stems:
                text = f"{directory / name}: {PROVENANCE_FILE} lists no such file"
                self._found.problems.append(text)
            elif name not in used:
                text = f"{directory / name}: not read, since no index names it"
                self._found.notes.append(text)

    def _verify_file(self, source: FolderSource, file: str, record: _Record | None) -> None:
        path = source.directory / file
        num_bytes = path.stat().st_size
        content = None if record is None else hashlib.sha256()
        nonfinite: int | None = None
        try:
            nonfinite = self._read_file(source, file, content)
        except CheckpointError as error:
            self._found.problems.append(str(error))
        state: Literal["same", "other", "not recorded"] = "not recorded"
        if record is not None and content is not None:
            found = _Record(content.hexdigest(), num_bytes)
            state = "same" if found == record else "other"
            if found != record and nonfinite is not None:
                self._found.problems.append(
                    f"{path}: {PROVENANCE_FILE} says {record}, found {found}"
                )
        self._found.files.append(
            VerifiedFile(
                file=str(path.relative_to(self._root)),
                num_tensors=len(source.files[file]),
                num_bytes=num_bytes,
                num_nonfinite=nonfinite,
                sha256=state,
            )
        )

    def _read_file(self, source: FolderSource, file: str, content: Any) -> int:
        """Read a file in its own order; returns how many elements are not finite."""
        names = source.files[file]
        path = source.directory / file
        if content is not None:
            tensor_bytes = sum(source.info(name).nbytes for name in names)
            with path.open("rb") as stream:
                content.update(stream.read(path.stat().st_size - tensor_bytes))

        def read(part: Range) -> tuple[Range, Tensor, _Nonfinite]:
            values = source.read(*part)
            return part, values, _nonfinite(values)

        found: dict[str, _Nonfinite] = {}
        for part, values, strange in self._workers.map(read, _ranges(source, names)):
            if content is not None:
                content.update(bytes_of(values))
            if strange.total:
                found[part.name] = found.get(part.name, _NONE).plus(strange, part.start)
            self._on_progress(values.nbytes)
        self._found.problems += [
            f"{path}: {name}: {strange} of {source.info(name).numel}"
            for name, strange in found.items()
        ]
        return sum(strange.total for strange in found.values())


class _Record(NamedTuple):
    """What a file should be, or is."""

    sha256: str
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes with SHA-256 {self.sha256}"


class _Nonfinite(NamedTuple):
    """Elements that are no numbers."""

    num_nan: int
    num_infinite: int
    first: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.num_nan + self.num_infinite

    def plus(self, later: _Nonfinite, start: int) -> _Nonfinite:
        """Together with those of a later part that begins at an element."""
        first = self.first if self.total else start + later.first
        return _Nonfinite(
            self.num_nan + later.num_nan, self.num_infinite + later.num_infinite, first
        )

    def __str__(self) -> str:
        counts = {"NaN": self.num_nan, "infinite": self.num_infinite}
        shown = " and ".join(f"{number} {what}" for what, number in counts.items() if number)
        return f"{shown} from element {self.first} on,"


_NONE = _Nonfinite(0, 0, 0)


def _nonfinite(values: Tensor) -> _Nonfinite:
    """What is not finite in a flat tensor; its elements are counted from 0."""
    if values.is_complex():
        values = values.abs()
    elif not values.is_floating_point():
        return _NONE
    elif values.itemsize == 1:
        values = values.float()  # 8-bit floats cannot be added up as they are
    # A sum is finite only if every term is: the fast answer. One that is not may have overflowed.
    if bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()):
        return _NONE
    finite = values.isfinite()
    if bool(finite.all()):
        return _NONE
    num_nan = int(values.isnan().sum())
    first = int(finite.logical_not().nonzero()[0])
    return _Nonfinite(num_nan, values.numel() - int(finite.sum()) - num_nan, first)


def _ranges(source: FolderSource, names: Sequence[str]) -> Iterator[Range]:
    for name in names:
        info = source.info(name)
        step = max(_RANGE_BYTES // info.dtype.itemsize, 1)
        for start in range(0, info.numel, step):
            yield Range(name, start, min(start + step, info.numel))


def _folders(root: Path) -> list[Path]:
    """A folder and all in it, without hidden ones: caches, and what is still being written."""
    inner = [path for path in root.rglob("*") if path.is_dir()]
    hidden = [p for p in inner if any(n.startswith(".") for n in p.relative_to(root).parts)]
    return [root, *sorted(set(inner) - set(hidden))]


def _read_json(path: Path) -> None:
    """Read a JSON file as whatever its name says that it is.

    Raises:
        CheckpointError: it cannot be read, or does not fit what lies beside it.
    """
    if path.name in _READERS:
        _READERS[path.name](path.parent)
    elif path.name in _OBJECT_FILES or path.name.endswith(_INDEX_ENDING):
        read_details(path)
    else:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _read_state(directory: Path) -> None:
    from kifmerge.training.state import FORMAT, STATE_FILE, VERSION

    check_format(read_details(directory / STATE_FILE), FORMAT, VERSION, directory / STATE_FILE)


_READERS: Mapping[str, Callable[[Path], object]] = {
    PROVENANCE_FILE: read_provenance,
    mask.DETAIL_FILE: mask.MaskSource,
    snapshot.DETAIL_FILE: open_scores,
    units.DETAIL_FILE: units.read_units,
    _STATE_FILE: _read_state,
}
