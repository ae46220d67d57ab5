"""Where fused tensors go: a folder of safetensors files, or the memory of a live model.

A sink knows all names, dtypes and shapes beforehand, takes flat parts in any order, and is done
only when every element has come exactly once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kifmerge.checkpoint.atomic import flush, write_json
from kifmerge.checkpoint.digest import file_sha256
from kifmerge.checkpoint.header import TensorInfo, bytes_of, header_of
from kifmerge.checkpoint.source import FolderSource, index_name
from kifmerge.checkpoint.write_behind import WriteBehind

# Parts that come before their turn wait to be hashed as long as they are few.
MOST_PENDING_BYTES = 1 << 26

Layout = Mapping[str, Sequence[tuple[str, TensorInfo]]]


class Sink(Protocol):
    """Takes tensors in flat parts."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape in which a tensor is to come."""
        ...

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Take the elements of a tensor from ``start`` on; each element once, in any order.

        Raises:
            ValueError: an unknown tensor, another dtype, or elements beyond its end.
        """
        ...

    def commit(self) -> None:
        """Make what was added good; everything must have been.

        Raises:
            ValueError: elements are missing, or came twice.
        """
        ...


class MemorySink:
    """Writes into live tensors, in place."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._targets = {name: tensor.detach() for name, tensor in tensors.items()}
        # A tensor that is not contiguous has no flat view: it is gathered and copied back.
        self._flat = {name: target.reshape(-1) for name, target in self._targets.items()}
        self._spans = {name: _Span(name, 0, flat.numel()) for name, flat in self._flat.items()}

    def info(self, name: str) -> TensorInfo:
        """Of the live tensor."""
        target = self._targets[name]
        return TensorInfo(target.dtype, tuple(target.shape), target.device)

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Copy into the live tensor."""
        if name not in self._targets:
            raise ValueError(f"{name} is none of the tensors to be written")
        _check_part(name, self.info(name), start, values)
        self._spans[name].take(start, start + values.numel())
        self._flat[name][start : start + values.numel()].copy_(values)

    def commit(self) -> None:
        """Check that nothing is missing."""
        for name, target in self._targets.items():
            self._spans[name].check()
            if not target.is_contiguous():
                target.copy_(self._flat[name].view_as(target))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file: its name, size and SHA-256."""

    name: str
    num_bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """As a journal keeps it."""
        return asdict(self)


class FolderSink:
    """Writes safetensors files of a known layout; headers first, the index last.

    Files are hashed while they are written. The folder should be one of
    :func:`kifmerge.checkpoint.atomic.whole_folder` or
    :func:`kifmerge.checkpoint.journal.resumable_folder`, so that it is seen only when it is whole.
    Safe to add to from threads.

    Args:
        directory: an existing folder.
        stem: ``model``, ``adapter_model``, ``mask``...
        files: file name -> name and info of its tensors, in the order of the file.
        finished: records of files that lie there already.

    Attributes:
        records: file name -> record of each finished file.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        files: Layout,
        *,
        finished: Collection[FileRecord] = (),
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._files = files
        self.records = {record.name: record for record in finished}
        self._open: dict[str, _OpenFile] = {}
        self._of_tensor: dict[str, _OpenFile] = {}
        for file_name, infos in files.items():
            if file_name not in self.records:
                opened = self._open[file_name] = _OpenFile(directory / file_name, infos)
                self._of_tensor.update(dict.fromkeys(opened.placed, opened))

    def info(self, name: str) -> TensorInfo:
        """Of the layout."""
        return self._of_tensor[name].placed[name].info

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Write into the file, where the tensor lies in it."""
        if name not in self._of_tensor:
            raise ValueError(f"{name} is none of the tensors to be written")
        self._of_tensor[name].add(name, start, values)

    def finish(self, file_name: str) -> FileRecord:
        """Flush a file that has all its elements.

        Raises:
            ValueError: elements are missing.
        """
        record = self.records[file_name] = self._open.pop(file_name).finish()
        return record

    def commit(self) -> None:
        """Check that nothing is missing; write the index of a sharded layout."""
        for file_name in [*self._open]:
            self.finish(file_name)
        if [*self._files] == [f"{self._stem}.safetensors"]:
            return
        infos = [info for infos in self._files.values() for _, info in infos]
        metadata = {
            "total_parameters": sum(info.numel for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        }
        weight_map = {name: file for file, infos in self._files.items() for name, _ in infos}
        write_json(
            self._directory / index_name(self._stem),
            {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
        )


class _OpenFile:
    """A safetensors file that is being written, and hashed as far as it is whole."""

    def __init__(self, path: Path, infos: Sequence[tuple[str, TensorInfo]]) -> None:
        self._path = path
        first, self.placed = header_of(infos)
        path.write_bytes(first)
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._hash: Any = hashlib.sha256(first)
        end = len(first) + sum(info.nbytes for _, info in infos)
        self._span = _Span(path.name, len(first), end)
        self._pending: dict[int, memoryview] = {}
        self._pending_bytes = 0
        self._behind = WriteBehind(end)
        self._header_bytes = len(first)

    def add(self, name: str, start: int, values: Tensor) -> None:
        tensor = self.placed[name]
        _check_part(name, tensor.info, start, values)
        if not values.numel():
            return
        content = bytes_of(values.detach().cpu().contiguous())
        offset = tensor.offset + start * values.itemsize
        with self._lock:
            hashed = self._span.position
            self._span.take(offset, offset + len(content), name)
            self._hash_in_order(hashed, offset, content)
        # One at a time: threads that write to one file wait for each other spinning.
        with self._write_lock:
            self._write(offset, content)

    def _hash_in_order(self, hashed: int, offset: int, content: memoryview) -> None:
        if self._hash is None:
            return
        if offset != hashed:
            self._pending[offset] = content
            self._pending_bytes += len(content)
            if self._pending_bytes > MOST_PENDING_BYTES:
                # Parts come in no order: the file is read again when it is whole.
                self._hash, self._pending = None, {}
            return
        self._hash.update(content)
        offset += len(content)
        while (following := self._pending.pop(offset, None)) is not None:
            self._hash.update(following)
            offset += len(following)
            self._pending_bytes -= len(following)

    def _write(self, offset: int, view: memoryview) -> None:
        descriptor = os.open(self._path, os.O_WRONLY)
        # The header counts with what follows it: it was written before.
        start = 0 if offset == self._header_bytes else offset
        try:
            while view:
                num_written = os.pwrite(descriptor, view, offset)
                view, offset = view[num_written:], offset + num_written
            self._behind.note(descriptor, start, offset)
        finally:
            os.close(descriptor)

    def finish(self) -> FileRecord:
        """Flush the file, which must be whole."""
        if not self._span.is_whole:
            raise ValueError(f"{self._path.name}: {self._missing()}")
        flush(self._path)
        sha256 = file_sha256(self._path) if self._hash is None else self._hash.hexdigest()
        return FileRecord(self._path.name, self._span.stop, sha256)

    def _missing(self) -> str:
        first, last = self._span.first_gap()
        for name, tensor in self.placed.items():
            if tensor.offset <= first < tensor.offset + tensor.info.nbytes:
                start, stop = (
                    min((byte - tensor.offset) // tensor.info.dtype.itemsize, tensor.info.numel)
                    for byte in (first, last)
                )
                return f"{name}: elements {start} to {stop} are missing"
        return "elements are missing"


class _Span:
    """What has come of the numbers from ``position`` to ``stop``: all before position, and more."""

    def __init__(self, label: str, position: int, stop: int) -> None:
        self._label = label
        self.position = position
        self.stop = stop
        self._beyond: dict[int, int] = {}

    @property
    def is_whole(self) -> bool:
        return self.position == self.stop and not self._beyond

    def take(self, start: int, stop: int, label: str | None = None) -> None:
        if start == stop:
            return
        if start < self.position or start in self._beyond:
            raise ValueError(f"{label or self._label}: elements came twice")
        self._beyond[start] = stop
        while (end := self._beyond.pop(self.position, None)) is not None:
            self.position = end
        if self._beyond and min(self._beyond) < self.position:
            raise ValueError(f"{label or self._label}: elements came twice")

    def first_gap(self) -> tuple[int, int]:
        return self.position, min([self.stop, *self._beyond])

    def check(self) -> None:
        if not self.is_whole:
            start, stop = self.first_gap()
            raise ValueError(f"{self._label}: elements {start} to {stop} are missing")


def layout_of(source: FolderSource) -> dict[str, list[tuple[str, TensorInfo]]]:
    """The files of a checkpoint as :class:`FolderSink` takes them, to write another like it."""
    return {
        file: [(name, source.info(name)) for name in names] for file, names in source.files.items()
    }


def new_layout(
    tensors: Iterable[tuple[str, TensorInfo]], stem: str, most_bytes: int
) -> dict[str, list[tuple[str, TensorInfo]]]:
    """Tensors in files of at most so many bytes, in their order.

    A tensor larger than that has a file of its own.

    Args:
        tensors: name and info of each, as it is to be written.
        stem: of the file names.
        most_bytes: of the tensors in one file.
    """
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    num_bytes = 0
    for name, info in tensors:
        if shards[-1] and num_bytes + info.nbytes > most_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append((name, info))
        num_bytes += info.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    total = len(shards)
    return {f"{stem}-{k:05d}-of-{total:05d}.safetensors": s for k, s in enumerate(shards, 1)}


def with_dtype(
    layout: Layout, dtype: torch.dtype | None
) -> dict[str, list[tuple[str, TensorInfo]]]:
    """A layout whose floating-point tensors have another dtype; None changes nothing."""
    return {
        file: [
            (
                name,
                TensorInfo(dtype, info.shape) if dtype and info.dtype.is_floating_point else info,
            )
            for name, info in infos
        ]
        for file, infos in layout.items()
    }


def _check_part(name: str, info: TensorInfo, start: int, values: Tensor) -> None:
    stop = start + values.numel()
    if values.dtype != info.dtype or values.dim() != 1 or not 0 <= start <= stop <= info.numel:
        raise ValueError(
            f"{name}: expected a flat part of {info}, "
            f"found elements {start} to {stop} as {values.dtype} {list(values.shape)}"
        )
