"""Selection over sources: which parameters of a whole model matter, slice by slice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Piece, pieces, read_piece
from kifmerge.checkpoint.source import Source
from kifmerge.tensor.fusion import normalise, score_bounds
from kifmerge.tensor.selection import Scope, Threshold, importance_threshold, mask_above

ShowPiece = Callable[[Piece], Tensor]


class ScoreStream:
    """Scores as a re-iterable of flat pieces, so that two passes need no more than a piece each.

    Args:
        scores: source of scores.
        names: of some parameters; None takes all.
    """

    def __init__(self, scores: Source, names: Sequence[str] | None = None) -> None:
        self._scores = scores
        self._pieces = list(pieces(scores, scores.names() if names is None else names))

    def __iter__(self) -> Iterator[Tensor]:
        return (read_piece(self._scores.read, piece) for piece in self._pieces)


@dataclass(frozen=True, slots=True)
class Marks:
    """The important parameters of one side, marked while their scores are read.

    Attributes:
        scores: of the parameters.
        thresholds: by parameter; one and the same for all where the scope is global.
        threshold: that one, or None where each tensor has its own.
    """

    scores: Source
    thresholds: Mapping[str, Threshold]
    threshold: float | None

    def show(self, piece: Piece) -> Tensor:
        """Bool for the parameters of a piece: the score exceeds the threshold."""
        if self.threshold is not None:
            return mask_above(read_piece(self.scores.read, piece), self.thresholds[piece[0].name])
        return torch.cat(
            [mask_above(self.scores.read(*part), self.thresholds[part.name]) for part in piece]
        )


def mark_important(
    scores: Source, important_fraction: float | str, scope: Scope, role: str
) -> Marks:
    """Find the exact thresholds of one side, in two passes; warns when nothing is important.

    Args:
        scores: of all parameters.
        important_fraction: share to be found important.
        scope: one threshold for all parameters, or one per tensor.
        role: what the warning calls the scores: new, historical.

    Raises:
        ValueError: no scores, or NaN among them.
    """
    thresholds: Mapping[str, Threshold]
    common = None
    if scope == "global":
        common = importance_threshold(ScoreStream(scores), important_fraction)
        thresholds = dict.fromkeys(scores.names(), common)
    else:
        thresholds = {
            name: importance_threshold(ScoreStream(scores, [name]), important_fraction)
            for name in scores.names()
            if scores.info(name).numel
        }
    if float(important_fraction) > 0 and all(t.is_degenerate for t in thresholds.values()):
        warnings.warn(
            f"the {role} importance scores are all equal: nothing is found important",
            stacklevel=2,
        )
    return Marks(scores, thresholds, None if common is None else common.value)


def normalised_scores(scores: Source) -> ShowPiece:
    """Shows scores min-max normalised over the whole model; one pass to find their bounds."""
    bounds = score_bounds(ScoreStream(scores))
    return lambda piece: normalise(read_piece(scores.read, piece), bounds)
