"""Pieces: the work of going through many tensors, small or huge, in steps of about one size.

What is done element by element costs as much for many small tensors at once as for a large one,
and memory stays flat when a huge tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kifmerge.checkpoint.source import Source

ReadSlice = Callable[[str, int, int], Tensor]

# Measured: on a CPU the scratch tensors of a piece should stay in cache.
CPU_PIECE_BYTES = 1 << 20
ACCELERATOR_PIECE_BYTES = 1 << 27
_FLOAT32_BYTES = 4
_BITS = 8


class Range(NamedTuple):
    """Elements ``start`` to ``stop`` of the row-major tensor ``name``."""

    name: str
    start: int
    stop: int


Piece = Sequence[Range]


def pieces(
    source: Source,
    names: Iterable[str],
    *,
    most_bytes: int | None = None,
    kind_of: Callable[[str], Hashable] | None = None,
) -> Iterator[Piece]:
    """Bundle small tensors, and cut large ones, into pieces of one kind, dtype and device.

    Cuts lie at multiples of 8 elements, so that bit masks can be cut there too. Empty tensors are
    in no piece.

    Args:
        source: says how large each tensor is.
        names: of the tensors to go through, in order.
        most_bytes: of a piece as float32, which is what rules compute in.
        kind_of: a tensor's name -> what its piece mates must share with it.
    """
    piece: list[Range] = []
    kind: Hashable = None
    numel = 0
    for name in names:
        info = source.info(name)
        on_cpu = info.device.type == "cpu"
        limit_bytes = most_bytes or (CPU_PIECE_BYTES if on_cpu else ACCELERATOR_PIECE_BYTES)
        limit = max(limit_bytes // _FLOAT32_BYTES // _BITS, 1) * _BITS
        own_kind = (info.dtype, info.device, kind_of and kind_of(name))
        for start in range(0, info.numel, limit):
            cut = Range(name, start, min(start + limit, info.numel))
            full = numel + cut.stop - start > limit
            if piece and (full or kind != own_kind):
                yield piece
                piece, numel = [], 0
            piece.append(cut)
            kind, numel = own_kind, numel + cut.stop - start
    if piece:
        yield piece


def read_piece(read: ReadSlice, piece: Piece) -> Tensor:
    """The elements of a piece, one range after another, in one dimension."""
    if len(piece) == 1:
        return read(*piece[0])
    return torch.cat([read(*part) for part in piece])


def split_piece(values: Tensor, piece: Piece) -> Iterator[tuple[Range, Tensor]]:
    """Undo :func:`read_piece`: each range with its own elements."""
    if len(piece) == 1:
        yield piece[0], values
        return
    yield from zip(piece, values.split([p.stop - p.start for p in piece]), strict=True)
