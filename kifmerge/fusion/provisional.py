"""Marks for which scores are read twice: finding the threshold first would take one pass more.

The first pass finds the bracket that the threshold lies in. The second marks what lies beyond it,
and puts the few scores within it aside. Both wait on the disk, at little more than a bit for each
score, until all scores have been seen and the threshold is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kifmerge.checkpoint.mask import MaskSink, MaskSource
from kifmerge.checkpoint.pieces import Piece, Range, pieces, read_piece, split_piece
from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.workers import Workers
from kifmerge.tensor.buckets import count_low_bits, low_bits
from kifmerge.tensor.selection import Bracket, Threshold, mask_above

_ASIDE_FILE = "aside"
_ENTRY = np.dtype([("place", "<i8"), ("score", "<f4")])
# More than this share of all scores is not put aside: reading them again costs less.
_MOST_ASIDE_FRACTION = 1 / 32


def is_worth_while(bracket: Bracket) -> bool:
    """Whether so few scores lie within a bracket that they are better put aside."""
    return bracket.num_within <= bracket.num_scores * _MOST_ASIDE_FRACTION


class ProvisionalMarks:
    """Marks of the important parameters, while they are being found.

    Args:
        scores: of the parameters, without NaN.
        bracket: of their threshold.
        directory: an empty folder, which must stay as long as marks are shown.

    Attributes:
        threshold: None before :meth:`find`.
    """

    def __init__(self, scores: Source, bracket: Bracket, directory: Path) -> None:
        self._scores = scores
        self._bracket = bracket
        self._directory = directory
        # Tensor name -> where scores of its parts were put aside: offset and length in bytes.
        self._aside: dict[str, list[tuple[Range, int, int]]] = {n: [] for n in scores.names()}
        self.threshold: Threshold | None = None

    def find(self, workers: Workers) -> Threshold:
        """Read the scores, mark what is beyond the bracket, and find the threshold.

        Args:
            workers: share the pass.
        """
        names = self._scores.names()
        sink = MaskSink(self._directory, ((n, self._scores.info(n).shape) for n in names), {})

        def mark(piece: Piece) -> tuple[Tensor, list[tuple[Range, Any]]]:
            scores = read_piece(self._scores.read, piece)
            for part, above in split_piece(self._bracket.above(scores), piece):
                sink.add(part.name, part.start, above)
            places, low = low_bits(scores, self._bracket.bucket)
            return count_low_bits(low), list(_entries(piece, scores, places))

        low_counts = count_low_bits(torch.zeros(0, dtype=torch.int32))
        with (self._directory / _ASIDE_FILE).open("wb") as file:
            for counts, entries_of_parts in workers.map(mark, pieces(self._scores, names)):
                low_counts += counts
                for part, entries in entries_of_parts:
                    self._aside[part.name].append((part, file.tell(), entries.nbytes))
                    file.write(entries.tobytes())
        sink.commit()
        self.threshold = self._bracket.threshold(low_counts)
        self._beyond = MaskSource(self._directory)
        return self.threshold

    def show(self, piece: Piece) -> Tensor:
        """Bool for the parameters of a piece: the score exceeds the threshold."""
        return torch.cat([self._show_part(part) for part in piece])

    def _show_part(self, part: Range) -> Tensor:
        assert self.threshold is not None
        marks = self._beyond.read(*part)
        for entries in self._read_aside(part):
            is_important = mask_above(torch.from_numpy(entries["score"].copy()), self.threshold)
            places = torch.from_numpy(entries["place"][is_important.numpy()])
            inside = (places >= part.start) & (places < part.stop)
            marks[places[inside] - part.start] = True
        return marks

    def _read_aside(self, part: Range) -> Iterator[Any]:
        with (self._directory / _ASIDE_FILE).open("rb") as file:
            for written, offset, num_bytes in self._aside[part.name]:
                if written.start < part.stop and part.start < written.stop:
                    file.seek(offset)
                    yield np.frombuffer(file.read(num_bytes), _ENTRY)


def _entries(piece: Piece, scores: Tensor, places: Tensor) -> Iterator[tuple[Range, Any]]:
    """Of each part of a piece, the scores at the places of the piece that lie in it."""
    before = 0
    for part in piece:
        after = before + part.stop - part.start
        own = places[(places >= before) & (places < after)]
        entries = np.empty(len(own), _ENTRY)
        entries["place"] = (own - before + part.start).numpy()
        entries["score"] = scores[own].float().numpy()
        yield part, entries
        before = after
