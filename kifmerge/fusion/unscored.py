"""Tensors that no rule can judge: frozen ones, buffers, integers, whatever has no scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Piece, pieces, read_piece, split_piece
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.sink import Sink
from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.workers import Workers
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.fusion.checked import FiniteSource
from kifmerge.fusion.evidence import NOTHING
from kifmerge.fusion.fuse import fuse
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.weights import Weights

Unscored = Literal["base", "new", "average"]


class UnscoredTensors:
    """What becomes of tensors without scores: handed on where all inputs agree, else by a choice.

    All inputs are read and compared here, before anything is written.

    Args:
        names: of the tensors.
        weights: the inputs.
        choice: take the ``base``'s, the ``new`` one's, or the ``average`` of the task vectors;
            None refuses tensors that differ.
        workers: share the comparison.
        ranks: share it too, tensor by tensor.

    Attributes:
        differing: names of the tensors that differ.

    Raises:
        CheckpointError: tensors differ, and there is no choice, or they cannot be averaged; or
            NaN or infinity.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Weights,
        choice: Unscored | None,
        workers: Workers,
        ranks: Ranks = ALONE,
    ) -> None:
        self._weights = weights
        self._choice = choice
        self._workers = workers
        own = ranks.share(names, lambda name: weights.sources[0].info(name).nbytes)
        differing = {name for found in ranks.gather(self._compare(own)) for name in found}
        self.differing = [name for name in names if name in differing]
        self._refuse()

    def _compare(self, names: Sequence[str]) -> list[str]:
        sources = self._weights.sources
        if self._weights.nonfinite == "refuse":
            sources = [FiniteSource(source) for source in sources]
        first, *others = sources

        def differing_in(piece: Piece) -> list[str]:
            parts = [[source.read(*part) for part in piece] for source in (first, *others)]
            return [
                part.name
                for number, part in enumerate(piece)
                if not all(_same_bits(parts[0][number], other[number]) for other in parts[1:])
            ]

        found = self._workers.map(differing_in, pieces(first, names))
        return list(dict.fromkeys(name for differing in found for name in differing))

    def _refuse(self) -> None:
        infos = {name: self._weights.sources[0].info(name) for name in self.differing}
        if self._choice is None and self.differing:
            problems = [f"{name}: {info}" for name, info in infos.items()]
            raise CheckpointError(
                problem_list(
                    "tensors without importance scores differ between the inputs", problems
                )
                + "\nDecide with --unscored base, new or average"
            )
        whole = [name for name, info in infos.items() if not info.dtype.is_floating_point]
        if self._choice == "average" and whole:
            problems = [f"{name}: {infos[name]}" for name in whole]
            raise CheckpointError(
                problem_list("whole numbers that differ cannot be averaged", problems)
                + "\nDecide with --unscored base or new"
            )

    def copy(self, names: Iterable[str], sink: Sink) -> None:
        """Hand on some of the tensors, in their order; not committed here."""
        mean = FusionOptions(rule="linear" if self._weights.base is None else "average")
        for name in names:
            if self._choice == "average" and name in self.differing:
                fuse([name], self._weights, NOTHING, mean, sink, workers=self._workers)
                continue
            source = self._weights.models[0] if self._choice == "new" else self._weights.sources[0]
            _copy(name, source, sink)


def _copy(name: str, source: Source, sink: Sink) -> None:
    for piece in pieces(source, [name]):
        values: Tensor = read_piece(source.read, piece).to(sink.info(name).dtype)
        for part, part_values in split_piece(values, piece):
            sink.add(part.name, part.start, part_values)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )
