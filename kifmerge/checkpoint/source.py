"""Where tensors are read from: a folder of safetensors files, or the memory of a live model.

Everything that reads weights reads them through a :class:`Source`, a flat slice at a time: a rule
that sees slices alone works for any size of model, and files and training share one path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kifmerge.checkpoint.digest import TensorDigests, digest
from kifmerge.checkpoint.header import PlacedTensor, TensorInfo, bytes_of, read_header
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import CheckpointError, problem_list

__all__ = ["FolderSource", "MemorySource", "Source", "TensorInfo", "open_source"]

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

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self.stem = stem
        self._placed: dict[str, tuple[Path, PlacedTensor]] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        self.digests = TensorDigests()
        self._fingerprint: str | None = None
        single = f"{stem}.safetensors"
        if (directory / single).is_file():
            weight_map, shards = None, [single]
        else:
            weight_map = _weight_map(directory, stem)
            shards = sorted(set(weight_map.values()))
        self.files = {shard: self._open(shard) for shard in shards}
        if weight_map is not None:
            self._check_index(weight_map)

    def _open(self, file_name: str) -> tuple[str, ...]:
        path = self.directory / file_name
        placed = read_header(path)
        self._states[path] = _file_state(path)
        twice = sorted(placed.keys() & self._placed.keys())
        if twice:
            raise CheckpointError(f"{path}: {twice[0]} is in another shard too")
        self._placed.update({name: (path, tensor) for name, tensor in placed.items()})
        return tuple(placed)

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        found = {name: shard for shard, names in self.files.items() for name in names}
        problems = [
            f"{name}: expected in {weight_map.get(name, 'no shard')}, "
            f"found in {found.get(name, 'no shard')}"
            for name in sorted({*weight_map, *found})
            if weight_map.get(name) != found.get(name)
        ]
        if problems:
            index_path = self.directory / index_name(self.stem)
            raise CheckpointError(problem_list(f"{index_path} and its shards disagree", problems))

    def names(self) -> Sequence[str]:
        """Shard by shard, in the order of the files."""
        return tuple(self._placed)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape, from the header."""
        return self._find(name)[1].info

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read these elements alone, into memory of their own."""
        path, tensor = self._find(name)
        if not 0 <= start <= stop <= tensor.info.numel:
            raise IndexError(f"{name}: elements {start} to {stop} of {tensor.info.numel}")
        values = torch.empty(stop - start, dtype=tensor.info.dtype)
        if stop > start:
            self._read_into(path, tensor.offset + start * values.itemsize, values)
        self.digests.feed(name, tensor.info, start, values)
        return values

    def _read_into(self, path: Path, offset: int, values: Tensor) -> None:
        view = memoryview(bytes_of(values))
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != self._states[path]:
                    raise CheckpointError(f"{path}: changed while it was being read")
                while view:
                    num_read = os.preadv(descriptor, [view], offset)
                    if num_read == 0:
                        raise CheckpointError(f"{path}: truncated while it was being read")
                    view, offset = view[num_read:], offset + num_read
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    def where(self, name: str) -> str:
        """Path of the file that holds the tensor."""
        return str(self._find(name)[0])

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

    def _find(self, name: str) -> tuple[Path, PlacedTensor]:
        try:
            return self._placed[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} holds no tensor {name}") from None


def open_source(path: Path | str) -> FolderSource:
    """Open a checkpoint: a model's folder or a PEFT adapter's, from its headers alone.

    Raises:
        CheckpointError: no such folder, no safetensors weights, pickles only, a quantised
            checkpoint, or damaged files.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such folder. Expected a checkpoint: a folder with safetensors files"
        )
    is_adapter = (directory / ADAPTER_CONFIG).exists()
    stem = ADAPTER_STEM if is_adapter else MODEL_STEM
    if not is_adapter:
        _refuse_quantised(directory)
    expected = (directory / f"{stem}.safetensors", directory / index_name(stem))
    if not any(path.exists() for path in expected):
        raise CheckpointError(_no_weights(directory, stem))
    return FolderSource(directory, stem)


def index_name(stem: str) -> str:
    """File name of the index of a sharded artifact.

    >>> index_name("model")
    'model.safetensors.index.json'
    """
    return f"{stem}.safetensors.index.json"


def _no_weights(directory: Path, stem: str) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    expected = f"expected {stem}.safetensors or {index_name(stem)}"
    if not pickles:
        return f"{directory} holds no weights: {expected}"
    return (
        f"{directory}: {expected}, found pickles only ({', '.join(pickles[:3])}), which may run "
        "code when they are loaded. Load it with transformers or peft where you trust it, and "
        "save_pretrained(...) it again: that writes safetensors"
    )


def _refuse_quantised(directory: Path) -> None:
    quantised = read_details(directory / "config.json").get("quantization_config")
    if quantised:
        found = quantised if isinstance(quantised, dict) else {}
        method = found.get("quant_method") or "an unnamed method"
        raise CheckpointError(
            f"{directory} is quantised by {method}: its files hold packed integers and scales, "
            "between which task vectors mean nothing. Take the checkpoint as it was before "
            "quantisation, and quantise the result"
        )


def _weight_map(directory: Path, stem: str) -> dict[str, str]:
    path = directory / index_name(stem)
    if not path.exists():
        raise CheckpointError(f"{directory}: expected {stem}.safetensors or {path.name}")
    weight_map: Any = read_details(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map of tensor name to shard")
    for shard in {json.dumps(shard): shard for shard in weight_map.values()}.values():
        # A name with folders in it could lead out of the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: {shard!r} is no file name of a shard")
    missing = sorted(s for s in set(weight_map.values()) if not (directory / s).is_file())
    if missing:
        names = {shard: name for name, shard in weight_map.items()}
        problems = [f"{shard}, which should hold {names[shard]}" for shard in missing]
        raise CheckpointError(problem_list(f"{path} names shards that are missing", problems))
    return weight_map


def _file_state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
