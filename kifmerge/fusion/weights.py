"""The weights of several models of one shape, and the task vectors between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kifmerge.checkpoint.device import send
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.pieces import Piece, Range, read_piece
from kifmerge.checkpoint.source import Source, peek
from kifmerge.errors import CheckpointError
from kifmerge.fusion.checked import nonfinite_error
from kifmerge.tensor.importance import all_finite
from kifmerge.tensor.native import sizes_of

Nonfinite = Literal["refuse", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Several models of one shape, read piece by piece.

    Attributes:
        base: where task vectors start; None for rules that work on weights alone.
        models: in their order: new and historical, or any number.
        parents: for each model, which other one its task vector starts at (an index); None: the
            base. Empty stands for None throughout.
        nonfinite: NaN or infinity is an error naming tensor and file (``refuse``), or is handed on.
        device: where they are fused; None: where each of them is.
    """

    base: Source | None
    models: Sequence[Source]
    parents: Sequence[int | None] = field(default=())
    nonfinite: Nonfinite = "refuse"
    device: torch.device | None = None

    @property
    def sources(self) -> list[Source]:
        """All of them, the base first."""
        return [*([] if self.base is None else [self.base]), *self.models]

    def stored(self, source: Source, piece: Piece) -> Tensor:
        """The elements of a piece as they are stored, unchecked; not to be written to."""
        return send(read_piece(source.read, piece), self.device)

    def refuse_nonfinite(self, source: Source, piece: Piece, values: Tensor) -> None:
        """Look for NaN and infinity in what was read, unless they are to be kept.

        Raises:
            CheckpointError: there are some.
        """
        if self.nonfinite == "refuse" and not all_finite([values.float()]):
            error = nonfinite_error(source, piece, values)
            raise CheckpointError(f"{error}. Mend the checkpoint, or --nonfinite keep")

    @property
    def starts(self) -> list[int]:
        """For each model, where its task vector starts: 0 for the base, i for the i-th model."""
        parents = self.parents or (None,) * len(self.models)
        return [0 if parent is None else parent + 1 for parent in parents]

    def parent(self, index: int) -> Source:
        """Where the task vector of a model starts."""
        parent = [self.base, *self.models][self.starts[index]]
        assert parent is not None
        return parent

    def vectors(self, base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
        """Task vectors of the models in one piece."""
        ends = [base, *models]
        return [values - ends[start] for values, start in zip(models, self.starts, strict=True)]


class VectorSizes:
    """Absolute values of one model's task vector, as a source.

    Args:
        weights: with a base.
        index: of the model.
    """

    def __init__(self, weights: Weights, index: int) -> None:
        self._weights = weights
        self._model = weights.models[index]
        self._parent = weights.parent(index)

    def names(self) -> Sequence[str]:
        """Of the model."""
        return self._model.names()

    def info(self, name: str) -> TensorInfo:
        """Of the model, in float32."""
        info = self._model.info(name)
        return TensorInfo(torch.float32, info.shape, info.device)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Of these elements."""
        piece = [Range(name, start, stop)]
        ends = (self._model, self._parent)
        stored = [self._weights.stored(source, piece) for source in ends]
        sizes, is_finite = sizes_of(*stored)
        if not is_finite:  # nor is one of the two, or their difference overflows
            for source, values in zip(ends, stored, strict=True):
                self._weights.refuse_nonfinite(source, piece, values)
            # NaN, where it is to be carried on, is in no order: it counts as the largest.
            sizes.nan_to_num_(math.inf, math.inf)
        return sizes

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """Of these elements, out of turn; whatever they are."""
        model, parent = (peek(s, name, start, stop) for s in (self._model, self._parent))
        if model is None or parent is None:
            return None
        sizes, _ = sizes_of(model, parent)
        return sizes

    def where(self, name: str) -> str:
        """The model's file."""
        return self._model.where(name)

    def fingerprint(self) -> str:
        """Of both ends."""
        return f"{self._model.fingerprint()} - {self._parent.fingerprint()}"
