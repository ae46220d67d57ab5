"""The engine: goes over all parameters in pieces, applies a rule, hands the result to a sink.

The recurrent loop and the merge of files both run through here: with live tensors as sources and
sink, or with folders. A piece is read, computed and written by one worker, others work on others;
what comes out depends neither on the pieces nor on the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kifmerge.checkpoint.device import own_stream
from kifmerge.checkpoint.pieces import Piece, pieces, split_piece
from kifmerge.checkpoint.sink import Sink
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.compiled import Compiled, compiled_rule
from kifmerge.fusion.evidence import Evidence
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.fusion.weights import Weights
from kifmerge.tensor.importance import all_finite

Role = Literal["new", "historical"]
ROLES: tuple[Role, Role] = ("new", "historical")

OnProgress = Callable[[int], None]


@torch.no_grad()
def fuse(
    names: Iterable[str],
    weights: Weights,
    evidence: Evidence,
    options: FusionOptions,
    sink: Sink,
    *,
    workers: Workers | None = None,
    most_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Overlap:
    """Fuse the named tensors of several models into a sink, piece by piece.

    Sources and sink may share memory: a piece is read whole before any of it is written.

    Args:
        names: of floating-point tensors that all sources hold alike.
        weights: where they are read.
        evidence: what the rule needs.
        options: the rule and its options.
        sink: takes the fused tensors in the dtype it wants them in; not committed here.
        workers: share the pieces; None: the caller's own thread does all.
        most_bytes: of a piece, see :func:`kifmerge.checkpoint.pieces.pieces`.
        on_progress: told the number of parameters fused after each piece.

    Returns:
        Under rules that use masks, what the models find important in common.
    """
    compiled = compiled_rule(weights, evidence, options)
    overlap = Overlap()

    def fuse_piece(piece: Piece) -> tuple[int, Tensor | None]:
        with own_stream(weights.device):
            dtype = sink.info(piece[0].name).dtype
            values, counts = _fuse_piece(piece, weights, evidence, options, compiled, dtype)
            if weights.device is not None:
                values, counts = values.cpu(), None if counts is None else counts.cpu()
            for part, part_values in split_piece(values, piece):
                sink.add(part.name, part.start, part_values)
        return values.numel(), counts

    def dtypes_of(name: str) -> Hashable:
        return sink.info(name).dtype, *(source.info(name).dtype for source in weights.sources)

    work = pieces(weights.models[0], names, most_bytes=most_bytes, kind_of=dtypes_of)
    for numel, counts in (workers or Workers(0)).map(fuse_piece, work):
        if counts is not None:
            overlap.add_counts(counts, numel)
        if on_progress is not None:
            on_progress(numel)
    return overlap


def _fuse_piece(
    piece: Piece,
    weights: Weights,
    evidence: Evidence,
    options: FusionOptions,
    compiled: Compiled | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Fused values of a piece, and under rules that use masks what they have in common."""
    rule = RULES[options.rule]
    sources = weights.sources if rule.needs_base else weights.models
    stored = [weights.stored(source, piece) for source in sources]
    if compiled is not None and all(values.device.type == "cpu" for values in stored):
        found = compiled.fuse(piece, stored, dtype)
        if found is not None:
            return found
    models = [values.float() for values in stored]
    if rule.fuse_vectors is None:
        assert rule.fuse_weights is not None
        shown = [show(piece, m) for show, m in zip(evidence.shows, models, strict=False)]
        fused = rule.fuse_weights(models, shown, options)
    else:
        base = models.pop(0)
        vectors = weights.vectors(base, models)
        del models
        shown = [show(piece, v) for show, v in zip(evidence.shows, vectors, strict=False)]
        fused = rule.fuse_vectors(base, vectors, shown, options)
    # One look at the result tells of all that was read.
    if not (rule.carries_nonfinite and all_finite([fused])):
        for source, values in zip(sources, stored, strict=True):
            weights.refuse_nonfinite(source, piece, values)
    counts_masks = options.needs in ("masks", "unit-masks")
    return fused.to(dtype), _count_overlap(shown) if counts_masks else None


class Overlap:
    """How many parameters are important to all models, to none, and to each one alone.

    Args:
        counts: in this order; empty without masks.
        num_marked: parameters that were looked at.
    """

    def __init__(self, counts: Sequence[int] = (), num_marked: int = 0) -> None:
        self._counts = torch.tensor(counts, dtype=torch.int64) if counts else None
        self.num_marked = num_marked

    def __add__(self, other: Overlap) -> Overlap:
        """Of both together."""
        total = Overlap()
        total.add(self)
        total.add(other)
        return total

    def add(self, other: Overlap) -> None:
        """Add what was found elsewhere."""
        if other._counts is not None:
            self.add_counts(other._counts, other.num_marked)

    def add_counts(self, counts: Tensor, num_marked: int) -> None:
        """Add the counts of a piece."""
        # Summed where the masks are: an answer each time would make an accelerator wait.
        known = self._counts
        self._counts = counts if known is None else known.to(counts.device) + counts
        self.num_marked += num_marked

    @property
    def counts(self) -> list[int]:
        """Important to all, to none, and to each model alone; empty without masks."""
        return [] if self._counts is None else [int(count) for count in self._counts.tolist()]

    def shares(self, roles: Sequence[str] = ROLES) -> dict[str, float]:
        """The same as shares of all: ``all`` (``both`` of two), ``ROLE_only``, ``neither``."""
        if self._counts is None:
            return {}
        everybody, nobody, *alone = (self._counts.double() / self.num_marked).tolist()
        two = len(alone) == 2
        if len(alone) == 1:
            roles, alone = (), []  # a single model is all of them
        return {
            "both" if two else "all": everybody,
            **{f"{role}_only": share for role, share in zip(roles, alone, strict=True)},
            **({} if two else {"several": 1.0 - everybody - nobody - sum(alone)}),
            "neither" if two else "none": nobody,
        }


def _count(mask: Tensor) -> Tensor | int:
    if mask.device.type == "cpu":  # measured: six times as fast as torch is there
        return int(np.count_nonzero(mask.numpy()))
    return torch.count_nonzero(mask)


def _count_overlap(masks: Sequence[Tensor]) -> Tensor:
    if len(masks) == 2:
        first, second = masks
        both = _count(first & second)
        alone = [_count(mask) - both for mask in masks]
        nobody = first.numel() - both - alone[0] - alone[1]
        return _stacked([both, nobody, *alone])
    votes = torch.stack([mask.to(torch.uint8) for mask in masks]).sum(0, dtype=torch.uint8)
    once = votes == 1
    return _stacked(
        [
            _count(votes == len(masks)),
            _count(votes == 0),
            *(_count(mask & once) for mask in masks),
        ]
    )


def _stacked(counts: Sequence[Tensor | int]) -> Tensor:
    """In one tensor, where they have been counted."""
    if any(isinstance(count, int) for count in counts):
        return torch.tensor(counts)
    return torch.stack([torch.as_tensor(count) for count in counts])
