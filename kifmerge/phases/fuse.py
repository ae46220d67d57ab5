"""The engine: goes over all parameters in pieces, applies a rule, hands the result to a sink.

The recurrent loop and the merge of files both run through here: with live tensors as sources and
sink, or with folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.sink import Sink
from kifmerge.checkpoint.source import Source
from kifmerge.phases.presets import RecurrentOptions, Role
from kifmerge.phases.rules import RULES
from kifmerge.phases.selection import ShowPiece, mark_important, normalised_scores

ROLES: tuple[Role, Role] = ("new", "historical")

# Where the historical task vector starts: at the new task's weights when the historical training
# went on from there, as in the recurrent loop, or at the base.
HistoricalParent = Literal["new", "base"]
OnProgress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a rule is shown of each side.

    Attributes:
        new: shows what the rule needs of the new task, piece by piece.
        historical: likewise of the earlier tasks.
        thresholds: (new, historical) where the scope is global and masks come from scores.
    """

    new: ShowPiece
    historical: ShowPiece
    thresholds: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Three states of one model, and where the historical task vector starts."""

    base: Source
    new: Source
    historical: Source
    historical_parent: HistoricalParent


def gather_evidence(scores: Mapping[Role, Source], options: RecurrentOptions) -> Evidence | None:
    """What the rule of the options needs, from the scores of both sides; None if it needs nothing.

    Raises:
        ValueError: no scores, or NaN among them.
    """
    needs = RULES[options.rule].needs
    if needs == "nothing":
        return None
    if needs == "scores":
        new, historical = (normalised_scores(scores[role]) for role in ROLES)
        return Evidence(new=new, historical=historical)
    new_marks, historical_marks = (
        mark_important(scores[role], options.important_fraction, options.scope, role)
        for role in ROLES
    )
    return Evidence(
        new=new_marks.show,
        historical=historical_marks.show,
        thresholds=(new_marks.threshold, historical_marks.threshold),
    )


@torch.no_grad()
def fuse(
    names: Iterable[str],
    weights: Weights,
    evidence: Evidence | None,
    options: RecurrentOptions,
    sink: Sink,
    *,
    most_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, float]:
    """Fuse the named tensors of two task vectors into a sink, piece by piece.

    Sources and sink may share memory: a piece is read whole before any of it is written.

    Args:
        names: of floating-point tensors that all sources hold alike.
        weights: where they are read.
        evidence: what the rule needs; None if it needs nothing.
        options: the rule and its options.
        sink: takes the fused tensors; not committed here.
        most_bytes: of a piece, see :func:`kifmerge.checkpoint.pieces.pieces`.
        on_progress: told the number of parameters fused after each piece.

    Returns:
        Under rules that use masks the shares of parameters important to ``both``, to the
        ``new_only``, to the ``historical_only``, and to ``neither``.
    """
    rule = RULES[options.rule]
    sides = [] if evidence is None else [evidence.new, evidence.historical]
    overlap = _Overlap()
    for piece in pieces(weights.base, names, most_bytes=most_bytes):
        base, new, historical = (
            read_piece(source.read, piece)
            for source in (weights.base, weights.new, weights.historical)
        )
        shown = [show(piece) for show in sides]
        new_values, base_values = new.float(), base.float()
        parent = new_values if weights.historical_parent == "new" else base_values
        fused = rule.fuse(
            base, new_values - base_values, historical.float() - parent, shown, options
        )
        if rule.needs == "masks":
            overlap.count(shown)
        for part, values in split_piece(fused, piece):
            sink.add(part.name, part.start, values)
        if on_progress is not None:
            on_progress(fused.numel())
    return overlap.shares()


class _Overlap:
    """Counts what both sides, or one of them, find important."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._num_marked = 0

    def count(self, shown: Sequence[Tensor]) -> None:
        new, historical = shown
        # Summed where the masks are: an answer each time would make an accelerator wait.
        counts = torch.stack(
            [
                torch.count_nonzero(new & historical),
                torch.count_nonzero(new),
                torch.count_nonzero(historical),
            ]
        )
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
        self._num_marked += new.numel()

    def shares(self) -> dict[str, float]:
        if self._counts is None:
            return {}
        both, new, historical = (self._counts.double() / self._num_marked).tolist()
        new_only, historical_only = new - both, historical - both
        return {
            "both": both,
            "new_only": new_only,
            "historical_only": historical_only,
            "neither": 1.0 - both - new_only - historical_only,
        }
