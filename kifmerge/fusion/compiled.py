"""Rules that the compiled part can make in one pass, with the bits that :mod:`rules` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Piece, split_piece
from kifmerge.fusion.evidence import Evidence, ShowPiece
from kifmerge.fusion.rules import RULES, FusionOptions, RuleName, all_alike
from kifmerge.fusion.weights import Weights
from kifmerge.tensor import native
from kifmerge.tensor.mask_weights import by_code
from kifmerge.tensor.sums import WeightedSum, mean_of_models, sum_of_vectors


class Compiled(Protocol):
    """A rule, with all that it depends on."""

    def fuse(
        self, piece: Piece, stored: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None] | None:
        """Fuse a piece.

        Args:
            piece: which elements they are.
            stored: they, on the CPU: of the base, where the rule takes one, and of each model.
            dtype: of the result.

        Returns:
            The fused values and, under rules that use masks, what the masks have in common, as
            :meth:`kifmerge.tensor.native.Summation.add_up` counts it; None where the rules must
            look themselves, since not all is finite.
        """
        ...


def is_compiled(weights: Weights, options: FusionOptions) -> bool:
    """Whether the compiled part is there and has a rule for these models, fused on the CPU."""
    if options.rule == "linear" and not options.normalise:
        return False
    fits = weights.device is None and len(weights.models) <= native.MOST_MODELS
    return fits and options.rule in (*_SUMS, "ties") and native.is_built()


def compiled_rule(weights: Weights, evidence: Evidence, options: FusionOptions) -> Compiled | None:
    """The rule, if the compiled part is there and has it.

    Args:
        weights: of which the models are pieces.
        evidence: what the rule is shown.
        options: the rule and its options.
    """
    if not is_compiled(weights, options):
        return None
    starts = weights.starts
    if options.rule == "ties":
        factors = all_alike(options, len(starts))
        return _Ties(starts, factors, options.scale, evidence.smallest_kept)
    wanted = _SUMS[options.rule](options, starts)
    return _Sum(native.Summation(wanted), evidence.shows)


@dataclass(frozen=True, slots=True)
class _Sum:
    summation: native.Summation
    shows: Sequence[ShowPiece]

    def fuse(
        self, piece: Piece, stored: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None] | None:
        masks = [show(piece, stored[0]) for show in self.shows]
        return self.summation.add_up(stored, masks, dtype)


@dataclass(frozen=True, slots=True)
class _Ties:
    starts: Sequence[int]
    weights: Sequence[float]
    scale: float
    smallest_kept: Sequence[Mapping[str, float]]

    def fuse(
        self, piece: Piece, stored: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None] | None:
        make = partial(native.ties, self.starts, self.weights, self.scale, dtype)
        kept = [tuple(of_model[part.name] for of_model in self.smallest_kept) for part in piece]
        if len(set(kept)) == 1:
            values = make(kept[0], stored)
            return None if values is None else (values, None)
        made = []
        parts_of_each = [[part for _, part in split_piece(one, piece)] for one in stored]
        for smallest_kept, parts in zip(kept, zip(*parts_of_each, strict=True), strict=True):
            values = make(smallest_kept, parts)
            if values is None:
                return None
            made.append(values)
        return torch.cat(made), None


def _recurrent_kif(options: FusionOptions, starts: Sequence[int]) -> WeightedSum:
    num_models = len(starts)
    fuse_vectors = RULES[options.rule].fuse_vectors
    assert fuse_vectors is not None

    def weights_of(masks: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the rule makes of a vector of ones where the others are zero."""
        zero = torch.zeros_like(masks[0], dtype=torch.float32)
        for model in range(num_models):
            vectors = [torch.ones_like(zero) if i == model else zero for i in range(num_models)]
            yield fuse_vectors(zero, vectors, masks, options)

    return sum_of_vectors(by_code(weights_of, num_models), starts)


# Options, where each model's task vector starts -> the rule as a sum.
_SUMS: Mapping[RuleName, Callable[[FusionOptions, Sequence[int]], WeightedSum]] = {
    "recurrent-kif": _recurrent_kif,
    "average": lambda options, starts: sum_of_vectors([1.0 / len(starts)] * len(starts), starts),
    "linear": lambda options, starts: mean_of_models(all_alike(options, len(starts))),
    "task-arithmetic": lambda options, starts: sum_of_vectors(
        [options.scale * weight for weight in all_alike(options, len(starts))],
        starts,
        origin_last=True,
    ),
}
