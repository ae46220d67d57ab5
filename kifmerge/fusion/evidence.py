"""What rules are shown of each model beside its weights: masks, scores, the largest changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kifmerge.checkpoint.device import send
from kifmerge.checkpoint.pieces import Piece, read_piece
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.units import Units, UnitSource
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.selection import mark_important, mark_largest, normalised_scores
from kifmerge.fusion.unit_scores import group_scores
from kifmerge.fusion.weights import VectorSizes, Weights
from kifmerge.tensor.units import important_units, normalise_scores

# A piece, and the model's task vector there (its weights, for rules on weights) -> what is shown.
ShowPiece = Callable[[Piece, Tensor], Tensor]

HISTORICAL = "historical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a rule is shown of each model, in the models' order.

    Attributes:
        shows: one function per model; none for rules that need nothing.
        thresholds: role -> threshold, where the scope is global and masks come from scores.
        smallest_kept: of each model, tensor name -> the smallest absolute value of its task vector
            that is kept; of the largest changes.
    """

    shows: Sequence[ShowPiece] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    smallest_kept: Sequence[Mapping[str, float]] = ()


NOTHING = Evidence()


def evidence_from_scores(
    scores: Mapping[str, Source],
    options: FusionOptions,
    workers: Workers | None = None,
    ranks: Ranks = ALONE,
) -> Evidence:
    """What the rule needs, from the scores of each model's parameters.

    Args:
        scores: role -> scores, in the models' order.
        options: the rule and its options.
        workers: share the passes over the scores.
        ranks: share them too.

    Raises:
        ValueError: no scores, or NaN among them.
    """
    if options.needs == "nothing":
        return NOTHING
    if options.needs == "scores":
        shows = [normalised_scores(source, ranks) for source in scores.values()]
        return Evidence(shows=[_blind(show) for show in shows])
    if options.needs in ("unit-masks", "unit-scores"):
        units = {
            role: group_scores(source, options.unit, ranks=ranks) for role, source in scores.items()
        }
        likes = list(scores.values())
        return evidence_from_units(units, likes[0], options, cumulative=())
    marks = {
        role: mark_important(
            source, options.important_fraction, options.scope, role, workers=workers, ranks=ranks
        )
        for role, source in scores.items()
    }
    thresholds = {role: m.threshold for role, m in marks.items() if m.threshold is not None}
    return Evidence(shows=[_blind(m.show) for m in marks.values()], thresholds=thresholds)


def evidence_from_masks(masks: Mapping[str, Source]) -> Evidence:
    """Masks as they are kept, role by role."""
    return Evidence(shows=[_shown_as_kept(mask) for mask in masks.values()])


def evidence_from_units(
    units: Mapping[str, Units],
    like: Source,
    options: FusionOptions,
    *,
    cumulative: Sequence[str] = (HISTORICAL,),
) -> Evidence:
    """Masks or scores of skill units, shown for each of their elements.

    Args:
        units: role -> units.
        like: says the shapes of the parameters.
        options: the rule and its options.
        cumulative: roles whose cumulative scores count, rather than the task's own.
    """
    shows = []
    for role, group in units.items():
        scores = [u.cumulative if role in cumulative else u.score for u in group.units]
        values: Sequence[float] | Sequence[bool]
        if options.needs in ("masks", "unit-masks"):
            values = important_units(scores, options.important_fraction)
        else:
            values = normalise_scores(scores)
        shows.append(_shown_as_kept(UnitSource(group, like, values, f"{role} units")))
    return Evidence(shows=shows)


def evidence_from_vectors(
    weights: Weights,
    names: Sequence[str],
    options: FusionOptions,
    workers: Workers,
    ranks: Ranks = ALONE,
) -> Evidence:
    """Masks of the largest elements of each task vector.

    Args:
        weights: base and models.
        names: of the parameters to be fused.
        options: density and scope.
        workers: share the passes over the weights.
        ranks: share them too.
    """
    marks = [
        mark_largest(
            VectorSizes(weights, index), names, options.density, options.scope, workers, ranks
        )
        for index in range(len(weights.models))
    ]
    return Evidence(
        shows=[m.show_largest for m in marks], smallest_kept=[m.smallest_kept for m in marks]
    )


def _blind(show: Callable[[Piece], Tensor]) -> ShowPiece:
    return lambda piece, vector: send(show(piece), vector.device)


def _shown_as_kept(source: Source) -> ShowPiece:
    return lambda piece, vector: send(read_piece(source.read, piece), vector.device)
