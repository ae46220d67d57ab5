"""Sources that are looked at while they are read, and one that has nothing to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.pieces import Piece, Range
from kifmerge.checkpoint.source import Source, peek
from kifmerge.errors import CheckpointError
from kifmerge.tensor.importance import all_finite


class FiniteSource:
    """A source that refuses NaN and infinity while they are read, naming tensor and file."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def names(self) -> Sequence[str]:
        """Of the source."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Of the source."""
        return self._source.info(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Of the source.

        Raises:
            CheckpointError: an element is not finite.
        """
        values = self._source.read(name, start, stop)
        if values.dtype.is_floating_point and not all_finite([_summable(values)]):
            raise nonfinite_error(self, [Range(name, start, stop)], values)
        return values

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """Of the source, whatever it is."""
        return peek(self._source, name, start, stop)

    def where(self, name: str) -> str:
        """Of the source."""
        return self._source.where(name)

    def fingerprint(self) -> str:
        """Of the source."""
        return self._source.fingerprint()


class ZeroSource:
    """Zeros in the shapes of another source: the base of adapters that have none in common."""

    def __init__(self, like: Source) -> None:
        self._like = like

    def names(self) -> Sequence[str]:
        """Of the other source."""
        return self._like.names()

    def info(self, name: str) -> TensorInfo:
        """Of the other source."""
        return self._like.info(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Zeros."""
        return torch.zeros(stop - start, dtype=self.info(name).dtype)

    def peek(self, name: str, start: int, stop: int) -> Tensor:
        """Zeros."""
        return self.read(name, start, stop)

    def where(self, name: str) -> str:
        """Nowhere."""
        return "zero"

    def fingerprint(self) -> str:
        """Of no file."""
        return "zero"


def nonfinite_error(source: Source, piece: Piece, values: Tensor) -> CheckpointError:
    """An error that names the first element of a piece that is not finite; there must be one."""
    first = int(values.float().isfinite().logical_not().nonzero()[0])
    before = 0
    for part in piece:
        if first < before + part.stop - part.start:
            break
        before += part.stop - part.start
    return CheckpointError(
        f"{source.where(part.name)}: {part.name}: element {part.start + first - before} is "
        f"{float(values[first])}: a merge would carry it on"
    )


def _summable(values: Tensor) -> Tensor:
    """8-bit floats cannot be added up as they are."""
    return values.float() if values.itemsize == 1 else values
