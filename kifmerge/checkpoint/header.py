"""The header of a safetensors file: read with distrust, written before its tensors.

A file is 8 bytes of header length, a JSON header, and the tensors in offset order without gaps:

    {"__metadata__": {"format": "pt"}, NAME: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}

Knowing where each tensor lies, any part of it can be read, or written, on its own.

References:
    The format as the safetensors library documents it.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from kifmerge.checkpoint.folder import File, LocalFile
from kifmerge.errors import CheckpointError
from kifmerge.hub.background import in_order
from kifmerge.hub.folder import RemoteFile

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library
_BY_PLACE = itemgetter(0, 1)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        dtype: of its elements.
        shape: as in the file or in memory.
        device: where a read puts it; no part of what makes two tensors alike.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and the byte of the file where it begins."""

    info: TensorInfo
    offset: int


def read_header(file: File | Path) -> dict[str, PlacedTensor]:
    """Tensors of a safetensors file by name, in the order of the file.

    Raises:
        CheckpointError: no such file, truncated, or a header that no writer makes.
        TryAgainError: network or server failed, or it came damaged.
    """
    file = LocalFile(file) if isinstance(file, Path) else file
    try:
        return _read_header(file)
    except CheckpointError:
        # Only a whole file can be compared with its hash: this may be no fault of the file's.
        file.compare_head()
        raise


def read_headers(files: Iterable[File]) -> Iterator[dict[str, PlacedTensor]]:
    """Headers of files in their order, those that come over the network several at a time.

    The first of those goes alone: where access is refused, or no part of a file can be had, it is
    so for all.

    Raises:
        CheckpointError: of the first file in order that has no header.
        TryAgainError: of the first for which network or server failed, or that came damaged.
    """
    left = iter(files)
    for file in left:
        yield read_header(file)
        if isinstance(file, RemoteFile) and not file.is_here:
            break
    yield from in_order(functools.partial(read_header, file) for file in left)


def _read_header(file: File) -> dict[str, PlacedTensor]:
    label, size = file.label, file.size
    start = file.head(_LENGTH_BYTES)
    length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else None
    if length is None or _LENGTH_BYTES + length > size:
        raise CheckpointError(f"{label}: truncated: it ends within its header")
    if length > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{label}: a header of {length} bytes is no safetensors file")
    begin = _LENGTH_BYTES + length
    text = file.head(begin)[_LENGTH_BYTES:]
    try:
        placed = _placed(json.loads(text, object_pairs_hook=_distinct), begin)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: not a safetensors header ({error})") from error
    end = max((begin, *(tensor.offset + tensor.info.nbytes for tensor in placed.values())))
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{label}: {state}: expected {end} bytes, found {size}")
    return placed


def header_of(infos: Iterable[tuple[str, TensorInfo]]) -> tuple[bytes, dict[str, PlacedTensor]]:
    """The first bytes of a file that holds the given tensors in order, and where each begins.

    Raises:
        CheckpointError: a dtype that safetensors files do not hold.

    >>> first, placed = header_of([("a", TensorInfo(torch.float32, (2,)))])
    >>> len(first) == placed["a"].offset
    True
    """
    content: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset, starts = 0, []
    for name, info in infos:
        if info.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{name}: a safetensors file holds no {info.dtype}")
        content[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        starts.append((name, info, offset))
        offset += info.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = struct.pack("<Q", len(text)) + text
    return first, {name: PlacedTensor(info, len(first) + start) for name, info, start in starts}


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    return values.view(torch.uint8).numpy().data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name appears twice")
    return content


def _placed(content: Any, begin: int) -> dict[str, PlacedTensor]:
    """Check that the tensors fill the file from ``begin`` on without gap or overlap.

    Raises:
        ValueError: what is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    content.pop(_METADATA, None)
    spans = sorted((_span(name, entry) for name, entry in content.items()), key=_BY_PLACE)
    placed, end = {}, 0
    for start, stop, name, info in spans:
        if start != end:
            raise ValueError(f"{name} begins at byte {start}, the one before ends at {end}")
        # Models of one shape share their names, of which some have a hundred thousand.
        placed[sys.intern(name)] = PlacedTensor(info, begin + start)
        end = stop
    return placed


@functools.lru_cache(maxsize=1 << 12)
def _info(dtype_name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The same one for tensors alike: a model has few shapes."""
    return TensorInfo(DTYPES[dtype_name], shape)


def _span(name: str, entry: Any) -> tuple[int, int, str, TensorInfo]:
    try:
        dtype_name, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name}: expected dtype, shape and data_offsets") from None
    if {*map(type, sizes)} != {int} or min(sizes) < 0:
        raise ValueError(f"{name}: sizes must be whole numbers from 0, found {sizes}")
    if dtype_name not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype_name!r} is not known here")
    info = _info(dtype_name, tuple(shape))
    if stop - start != info.nbytes:
        raise ValueError(f"{name}: {info} takes {info.nbytes} bytes, found {stop - start}")
    return start, stop, name, info
