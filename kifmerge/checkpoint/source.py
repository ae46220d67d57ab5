"""Where tensors are read from: a folder of safetensors files, or the memory of a live model.

Everything that reads weights reads them through a :class:`Source`, a flat slice at a time: a rule
that sees slices alone works for any size of model, and files and training share one path.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kifmerge.checkpoint.digest import TensorDigests, digest
from kifmerge.checkpoint.folder import (
    File,
    Folder,
    as_folder,
    file_sizes,
    has_file,
    is_folder,
    open_file,
)
from kifmerge.checkpoint.header import PlacedTensor, TensorInfo, bytes_of, read_headers
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.folder import RemoteFile

__all__ = ["FolderSource", "MemorySource", "Source", "TensorInfo", "open_source", "read_whole"]

MODEL_STEM = "model"
ADAPTER_STEM = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Source(Protocol):
    """Named tensors, of which any flat part can be read."""

    def names(self) -> Sequence[str]:
        """Names of all tensors, in the order in which reading them is cheapest."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, known without reading it."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the row-major tensor, in one dimension.

        May share memory with the source: not to be written to.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...

    def where(self, name: str) -> str:
        """The file of a tensor, or whatever tells the user where it came from."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that changes with any weight. Reads everything, the first time."""
        ...


@runtime_checkable
class Peekable(Protocol):
    """A source of which a few elements can be read out of turn."""

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """What :meth:`Source.read` gives, but for a look at it: it has not been read then.

        None where bytes are pulled in turn, and each once.
        """
        ...


def peek(source: Source, name: str, start: int, stop: int) -> Tensor | None:
    """A look at some elements, where the source allows it: see :class:`Peekable`."""
    return source.peek(name, start, stop) if isinstance(source, Peekable) else None


class MemorySource:
    """Tensors that live in memory; slices are views of contiguous ones.

    Args:
        tensors: by name, on any device; later changes of contiguous ones are seen.
        label: what :meth:`where` answers.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "memory") -> None:
        self._tensors = dict(tensors)
        self._flat: dict[str, Tensor] = {}
        self._label = label

    def names(self) -> Sequence[str]:
        """In the order of the mapping."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and device."""
        tensor = self._find(name)
        return TensorInfo(tensor.dtype, tuple(tensor.shape), tensor.device)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A view."""
        flat = self._flat.get(name)
        if flat is None:
            flat = self._flat[name] = self._find(name).detach().reshape(-1)
        numel = flat.numel()
        if start == 0 and stop == numel:
            return flat
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}: elements {start} to {stop} of {numel}")
        return flat[start:stop]

    def peek(self, name: str, start: int, stop: int) -> Tensor:
        """The same view."""
        return self.read(name, start, stop)

    def where(self, name: str) -> str:
        """The label."""
        return self._label

    def fingerprint(self) -> str:
        """Of names, dtypes, shapes and values as they are now."""
        whole = hashlib.sha256()
        for name, tensor in self._tensors.items():
            whole.update(f"{name} {self.info(name)}\n".encode())
            whole.update(bytes_of(tensor.detach().reshape(-1).cpu()))
        return whole.hexdigest()

    def _find(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._label} holds no tensor {name}") from None


class FolderSource:
    """The safetensors files of one artifact in a folder: ``STEM.safetensors``, or shards.

    Only headers are read at first, and a slice costs its own bytes. Digests are taken of whatever
    is read, so that :meth:`fingerprint` reads no more than the rest. Safe to read from in threads.

    Args:
        directory: the folder.
        stem: ``model``, ``adapter_model``, ``importance``...

    Attributes:
        directory: the folder.
        stem: what its files are named after.
        files: file name -> names of its tensors, in the order of the file.
        digests: of the tensors that have been read whole.

    Raises:
        CheckpointError: nothing there, or damaged.
    """

    def __init__(self, directory: Folder, stem: str) -> None:
        self.directory = directory
        self.stem = stem
        self._placed: dict[str, tuple[File, PlacedTensor]] = {}
        self._expected: set[str] = set()
        self.digests = TensorDigests()
        self._fingerprint: str | None = None
        single = f"{stem}.safetensors"
        if has_file(directory, single):
            weight_map, shards = None, [single]
        else:
            weight_map = _weight_map(directory, stem)
            shards = sorted(set(weight_map.values()))
        opened = [open_file(directory, shard) for shard in shards]
        self.files = {
            shard: self._place(file, placed)
            for shard, file, placed in zip(shards, opened, read_headers(opened), strict=True)
        }
        if weight_map is not None:
            self._check_index(weight_map)

    def _place(self, file: File, placed: Mapping[str, PlacedTensor]) -> tuple[str, ...]:
        twice = sorted(placed.keys() & self._placed.keys())
        if twice:
            raise CheckpointError(f"{file.label}: {twice[0]} is in another shard too")
        self._placed.update({name: (file, tensor) for name, tensor in placed.items()})
        return tuple(placed)

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        found = {name: shard for shard, names in self.files.items() for name in names}
        if found == weight_map:
            return
        problems = [
            f"{name}: expected in {weight_map.get(name, 'no shard')}, "
            f"found in {found.get(name, 'no shard')}"
            for name in sorted({*weight_map, *found})
            if weight_map.get(name) != found.get(name)
        ]
        index = f"{self.directory}/{index_name(self.stem)}"
        raise CheckpointError(problem_list(f"{index} and its shards disagree", problems))

    def names(self) -> Sequence[str]:
        """Shard by shard, in the order of the files."""
        return tuple(self._placed)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape, from the header."""
        return self._find(name)[1].info

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read these elements alone, into memory of their own."""
        file, tensor = self._find(name)
        if stop > start and name not in self._expected:
            self.expect([name])
        values, content = _read(file, name, tensor, start, stop)
        self.digests.feed(name, tensor.info, start * values.itemsize, content)
        return values

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """Read these elements without a digest; None of a file that is not on this disk."""
        file, tensor = self._find(name)
        if isinstance(file, RemoteFile) and not file.is_here:
            return None
        return _read(file, name, tensor, start, stop)[0]

    def expect(self, names: Iterable[str]) -> None:
        """Tell which tensors are going to be read; without it each is a surprise to the network."""
        of_file: dict[File, list[PlacedTensor]] = {}
        for name in names:
            file, tensor = self._find(name)
            of_file.setdefault(file, []).append(tensor)
            self._expected.add(name)
        for file, expected in of_file.items():
            file.expect((t.offset, t.offset + t.info.nbytes) for t in expected)

    def where(self, name: str) -> str:
        """The file that holds the tensor."""
        return self._find(name)[0].label

    def fingerprint(self) -> str:
        """The folder's digest, as provenance records it."""
        if self._fingerprint is None:
            finished = self.digests.finished()
            known = {
                f"{file}/{name}": finished[name]
                for file, names in self.files.items()
                for name in names
                if name in finished
            }
            self._fingerprint = digest(self.directory, known)
        assert self._fingerprint is not None
        return self._fingerprint

    def _find(self, name: str) -> tuple[File, PlacedTensor]:
        try:
            return self._placed[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} holds no tensor {name}") from None


def _read(
    file: File, name: str, tensor: PlacedTensor, start: int, stop: int
) -> tuple[Tensor, memoryview]:
    """These elements, and their bytes."""
    if not 0 <= start <= stop <= tensor.info.numel:
        raise IndexError(f"{name}: elements {start} to {stop} of {tensor.info.numel}")
    values = torch.empty(stop - start, dtype=tensor.info.dtype)
    content = bytes_of(values)
    if stop > start:
        file.read_into(tensor.offset + start * values.itemsize, content)
    return values, content


def read_whole(source: Source, name: str) -> Tensor:
    """A tensor in its shape."""
    info = source.info(name)
    return source.read(name, 0, info.numel).view(info.shape)


def open_source(folder: Folder | str) -> FolderSource:
    """Open a checkpoint: a model's folder or a PEFT adapter's, from its headers alone.

    Raises:
        CheckpointError: no such folder, no safetensors weights, pickles only, a quantised
            checkpoint, or damaged files.
    """
    folder = as_folder(folder)
    if not is_folder(folder):
        raise CheckpointError(
            f"{folder}: no such folder. Expected a checkpoint: a folder with safetensors files"
        )
    is_adapter = has_file(folder, ADAPTER_CONFIG)
    stem = ADAPTER_STEM if is_adapter else MODEL_STEM
    if not is_adapter:
        _refuse_quantised(folder)
    if not any(has_file(folder, name) for name in (f"{stem}.safetensors", index_name(stem))):
        raise CheckpointError(_no_weights(folder, stem))
    return FolderSource(folder, stem)


def index_name(stem: str) -> str:
    """File name of the index of a sharded artifact.

    >>> index_name("model")
    'model.safetensors.index.json'
    """
    return f"{stem}.safetensors.index.json"


def _no_weights(folder: Folder, stem: str) -> str:
    names = file_sizes(folder)
    pickles = [name for name in names if any(fnmatch.fnmatch(name, p) for p in _PICKLES)]
    expected = f"expected {stem}.safetensors or {index_name(stem)}"
    if not pickles:
        return f"{folder} holds no weights: {expected}"
    return (
        f"{folder}: {expected}, found pickles only ({', '.join(pickles[:3])}), which may run "
        "code when they are loaded. Load it with transformers or peft where you trust it, and "
        "save_pretrained(...) it again: that writes safetensors"
    )


def _refuse_quantised(folder: Folder) -> None:
    quantised = read_details(folder / "config.json").get("quantization_config")
    if quantised:
        found = quantised if isinstance(quantised, dict) else {}
        method = found.get("quant_method") or "an unnamed method"
        raise CheckpointError(
            f"{folder} is quantised by {method}: its files hold packed integers and scales, "
            "between which task vectors mean nothing. Take the checkpoint as it was before "
            "quantisation, and quantise the result"
        )


def _weight_map(folder: Folder, stem: str) -> dict[str, str]:
    name = index_name(stem)
    if not has_file(folder, name):
        raise CheckpointError(f"{folder}: expected {stem}.safetensors or {name}")
    path = f"{folder}/{name}"
    weight_map: Any = read_details(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map of tensor name to shard")
    odd = [shard for shard in weight_map.values() if not isinstance(shard, str)]
    shards = set() if odd else {*weight_map.values()}
    # A name with folders in it could lead out of the checkpoint.
    for shard in [*odd, *sorted(shard for shard in shards if Path(shard).name != shard)]:
        raise CheckpointError(f"{path}: {shard!r} is no file name of a shard")
    missing = sorted(shard for shard in shards if not has_file(folder, shard))
    if missing:
        names = {shard: name for name, shard in weight_map.items()}
        problems = [f"{shard}, which should hold {names[shard]}" for shard in missing]
        raise CheckpointError(problem_list(f"{path} names shards that are missing", problems))
    return weight_map
