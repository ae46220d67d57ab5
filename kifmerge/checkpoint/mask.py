"""Masks on disk: which parameters are important, one bit each.

mask.safetensors   NAME as in the checkpoint's own files: the tensor's bits in row-major order, the
                   least significant bit of a byte first, padded with zeros to whole bytes
mask.json          format and version, shapes, threshold (one number, or one per tensor), fraction,
                   scope, digest of the snapshot that it was made from, made_by
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.folder import Folder, as_folder
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.pieces import pieces
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.checkpoint.sink import FolderSink
from kifmerge.checkpoint.source import FolderSource
from kifmerge.errors import CheckpointError, problem_list

FORMAT = "kifmerge.mask"
VERSION = 1
STEM = "mask"
DETAIL_FILE = "mask.json"
_BITS = 8


def pack_bits(mask: Tensor) -> Tensor:
    """Flat bool to uint8, eight to a byte, the first in the least significant bit.

    >>> pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True]))
    tensor([9, 1], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo :func:`pack_bits`, padding included.

    >>> unpack_bits(torch.tensor([9], dtype=torch.uint8))[:5]
    tensor([ True, False, False,  True, False])
    """
    unpacked = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    return torch.from_numpy(unpacked).view(torch.bool)


class MaskSource:
    """A mask in a folder, read in slices: a source of bool tensors.

    Attributes:
        details: content of ``mask.json``.

    Raises:
        CheckpointError: no mask there, one of a newer version, or damaged.
    """

    def __init__(self, directory: Folder | str) -> None:
        directory = self._directory = as_folder(directory)
        path = self._directory / DETAIL_FILE
        self.details: Mapping[str, Any] = read_details(path)
        if not self.details:
            raise CheckpointError(f"{directory} holds no mask: no {DETAIL_FILE}")
        check_format(self.details, FORMAT, VERSION, path)
        self._packed = FolderSource(self._directory, STEM)
        self._infos = self._checked_infos(path)

    def _checked_infos(self, path: Path) -> dict[str, TensorInfo]:
        shapes = self.details.get("shapes")
        if not isinstance(shapes, dict) or not all(_is_shape(s) for s in shapes.values()):
            raise CheckpointError(f"{path}: expected shapes: tensor name to a list of sizes")
        infos = {
            n: TensorInfo(torch.bool, tuple(shapes[n])) for n in self._packed.names() if n in shapes
        }
        packed = {name: self._packed.info(name) for name in self._packed.names()}
        expected = {
            name: packed_info(TensorInfo(torch.bool, tuple(s))) for name, s in shapes.items()
        }
        problems = [
            f"{name}: expected {expected.get(name, 'no such tensor')}, "
            f"found {packed.get(name, 'none')}"
            for name in sorted({*expected, *packed})
            if expected.get(name) != packed.get(name)
        ]
        if problems:
            raise CheckpointError(problem_list(f"{path} and its tensors disagree", problems))
        return infos

    @property
    def stored(self) -> FolderSource:
        """The packed bits."""
        return self._packed

    def names(self) -> Sequence[str]:
        """In the order of the file."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Bool, and the shape of the parameter."""
        if name not in self._infos:
            raise CheckpointError(f"{self._directory} holds no mask of {name}")
        return self._infos[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Bool for these elements; reads the bytes they lie in."""
        if not 0 <= start <= stop <= self.info(name).numel:
            raise IndexError(f"{name}: elements {start} to {stop} of {self.info(name).numel}")
        first = start // _BITS
        packed = self._packed.read(name, first, -(-stop // _BITS) if stop > start else first)
        return unpack_bits(packed)[start - first * _BITS : stop - first * _BITS]

    def where(self, name: str) -> str:
        """The file."""
        return self._packed.where(name)

    def fingerprint(self) -> str:
        """The folder's digest."""
        return self._packed.fingerprint()

    @property
    def num_bytes(self) -> int:
        """What reading the whole mask reads."""
        return sum(self._packed.info(name).nbytes for name in self._infos)


class MaskSink:
    """Writes a mask; the folder should be one of :func:`kifmerge.checkpoint.atomic.whole_folder`.

    Parts must begin at multiples of 8 elements, and end there or at the tensor's end, as those of
    :func:`kifmerge.checkpoint.pieces.pieces` do.

    Args:
        directory: an existing folder.
        shapes: of the masked parameters, by name.
        details: content of ``mask.json`` beside format, version and shapes.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Iterable[tuple[str, tuple[int, ...]]],
        details: Mapping[str, Any],
    ) -> None:
        self._directory = directory
        self._details = details
        self._infos = {name: TensorInfo(torch.bool, shape) for name, shape in shapes}
        packed = [(name, packed_info(info)) for name, info in self._infos.items()]
        self._sink = FolderSink(directory, STEM, {f"{STEM}.safetensors": packed})

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Take the bool of a flat part."""
        stop = start + values.numel()
        if start % _BITS or (stop % _BITS and stop != self._infos[name].numel):
            raise ValueError(f"{name}: elements {start} to {stop} do not fill whole bytes")
        self._sink.add(name, start // _BITS, pack_bits(values))

    def add_packed(self, source: FolderSource) -> None:
        """Take whole tensors of another mask, as they are stored."""
        for piece in pieces(source, source.names()):
            for part in piece:
                self._sink.add(part.name, part.start, source.read(*part))

    def commit(self) -> None:
        """Check that nothing is missing; write ``mask.json``."""
        self._sink.commit()
        header = {"format": FORMAT, "version": VERSION}
        shapes = {name: list(info.shape) for name, info in self._infos.items()}
        write_json(
            self._directory / DETAIL_FILE, {**header, **self._details, **header, "shapes": shapes}
        )


def packed_info(info: TensorInfo) -> TensorInfo:
    """How the mask of a tensor lies in a file."""
    return TensorInfo(torch.uint8, (-(-info.numel // _BITS),))


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
