"""Where fused tensors go: a folder of safetensors files, or the memory of a live model.

A sink knows all names, dtypes and shapes beforehand, takes flat parts in any order, and is done
only when every element has come exactly once.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.header import PlacedTensor, TensorInfo, header_of
from kifmerge.checkpoint.provenance import PROVENANCE_FILE
from kifmerge.checkpoint.source import FolderSource, bytes_of, index_name

# Not part of what a checkpoint's users load beside its weights: the weights themselves, in any
# format, their indexes, what trainers keep, and descriptions of the checkpoint they lie beside.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf",
    "*.index.json", "trainer_state.json", "importance.json", "mask.json", "README.md",
    "recurrent.json", PROVENANCE_FILE, ".*",
)  # fmt: skip
_COPIED_FOLDERS = ("additional_chat_templates",)


class Sink(Protocol):
    """Takes tensors in flat parts."""

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
        self._coverage = _Coverage(
            {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        )

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Copy into the live tensor."""
        self._coverage.add(name, start, values)
        self._flat[name][start : start + values.numel()].copy_(values)

    def commit(self) -> None:
        """Check that nothing is missing."""
        self._coverage.check()
        for name, target in self._targets.items():
            if not target.is_contiguous():
                target.copy_(self._flat[name].view_as(target))


class FolderSink:
    """Writes safetensors files of a known layout; headers first, the index last.

    The folder should be one of :func:`kifmerge.checkpoint.atomic.whole_folder`, so that nothing is
    left of an interrupted write.

    Args:
        directory: an existing folder.
        stem: ``model``, ``adapter_model``, ``mask``...
        files: file name -> name and info of its tensors, in the order of the file.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        files: Mapping[str, Sequence[tuple[str, TensorInfo]]],
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._files = files
        self._placed: dict[str, tuple[Path, PlacedTensor]] = {}
        for file_name, infos in files.items():
            path = directory / file_name
            first, placed = header_of(infos)
            path.write_bytes(first)
            self._placed.update({name: (path, tensor) for name, tensor in placed.items()})
        self._coverage = _Coverage({name: t.info for name, (_, t) in self._placed.items()})

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Write into the file, where the tensor lies in it."""
        self._coverage.add(name, start, values)
        path, tensor = self._placed[name]
        flat = values.detach().cpu().contiguous()
        view = memoryview(bytes_of(flat))
        offset = tensor.offset + start * flat.itemsize
        descriptor = os.open(path, os.O_WRONLY)
        try:
            while view:
                num_written = os.pwrite(descriptor, view, offset)
                view, offset = view[num_written:], offset + num_written
        finally:
            os.close(descriptor)

    def commit(self) -> None:
        """Check that nothing is missing; write the index of a sharded layout."""
        self._coverage.check()
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


def layout_of(source: FolderSource) -> dict[str, list[tuple[str, TensorInfo]]]:
    """The files of a checkpoint as :class:`FolderSink` takes them, to write another like it."""
    return {
        file: [(name, source.info(name)) for name in names] for file, names in source.files.items()
    }


def copy_companions(source_dir: Path, directory: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: config, tokenizer, templates, code."""
    for path in sorted(source_dir.iterdir()):
        if path.is_dir() and path.name in _COPIED_FOLDERS:
            shutil.copytree(path, directory / path.name)
        elif path.is_file() and not any(fnmatch.fnmatch(path.name, p) for p in _NOT_COPIED):
            shutil.copyfile(path, directory / path.name)


class _Coverage:
    """Which elements of each tensor have come."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(infos)
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in infos}

    def add(self, name: str, start: int, values: Tensor) -> None:
        if name not in self._infos:
            raise ValueError(f"{name} is none of the tensors to be written")
        info, stop = self._infos[name], start + values.numel()
        if values.dtype != info.dtype or values.dim() != 1 or not 0 <= start <= stop <= info.numel:
            raise ValueError(
                f"{name}: expected a flat part of {info}, "
                f"found elements {start} to {stop} as {values.dtype} {list(values.shape)}"
            )
        self._ranges[name].append((start, stop))

    def check(self) -> None:
        for name, info in self._infos.items():
            end = 0
            for start, stop in sorted(self._ranges[name]):
                if start != end:
                    raise ValueError(f"{name}: elements {end} to {start} are missing or came twice")
                end = stop
            if end != info.numel:
                raise ValueError(f"{name}: elements {end} to {info.numel} are missing")
