"""Sources that are looked at while they are read, and one that has nothing to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.source import Source
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
            strange = values.float().isfinite().logical_not().nonzero()[0].item()
            raise CheckpointError(
                f"{self.where(name)}: {name}: element {start + int(strange)} is "
                f"{float(values[int(strange)])}: a merge would carry it on"
            )
        return values

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

    def where(self, name: str) -> str:
        """Nowhere."""
        return "zero"

    def fingerprint(self) -> str:
        """Of no file."""
        return "zero"


def _summable(values: Tensor) -> Tensor:
    """8-bit floats cannot be added up as they are."""
    return values.float() if values.itemsize == 1 else values
