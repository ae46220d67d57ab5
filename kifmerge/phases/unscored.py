"""Tensors that no rule can judge: frozen ones, buffers, integers, whatever has no scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kifmerge.checkpoint.pieces import Piece, pieces, read_piece, split_piece
from kifmerge.checkpoint.sink import Sink
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.phases.fuse import Weights
from kifmerge.tensor.fusion import add_vectors

Unscored = Literal["base", "new", "average"]


def copy_unscored(
    names: Sequence[str], weights: Weights, choice: Unscored | None, sink: Sink
) -> list[str]:
    """Hand on tensors without scores: as they are where all inputs agree, else by the choice.

    Args:
        names: of the tensors.
        weights: the three inputs.
        choice: take the ``base``'s, the ``new`` one's, or the ``average`` of both task vectors;
            None refuses tensors that differ.
        sink: takes them; not committed here.

    Returns:
        Names of the tensors that differ.

    Raises:
        CheckpointError: tensors differ, and there is no choice, or they cannot be averaged.
    """
    differing: list[str] = []
    for name in names:
        agrees = True
        for piece in pieces(weights.base, [name]):
            base, new, historical = _read(weights, piece)
            same = _same_bits(base, new) and _same_bits(base, historical)
            agrees &= same
            if choice == "new":
                values = new
            elif choice == "average" and not same and base.dtype.is_floating_point:
                values = _average(weights, base, new, historical)
            else:
                values = base
            for part, part_values in split_piece(values, piece):
                sink.add(part.name, part.start, part_values)
        if not agrees:
            differing.append(name)
    _refuse(differing, weights, choice)
    return differing


def _read(weights: Weights, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    return (
        read_piece(weights.base.read, piece),
        read_piece(weights.new.read, piece),
        read_piece(weights.historical.read, piece),
    )


def _average(weights: Weights, base: Tensor, new: Tensor, historical: Tensor) -> Tensor:
    parent = new if weights.historical_parent == "new" else base
    vectors = new.float() - base.float(), historical.float() - parent.float()
    return add_vectors(base, *vectors, 0.5, 0.5)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _refuse(differing: Sequence[str], weights: Weights, choice: Unscored | None) -> None:
    infos = {name: weights.base.info(name) for name in differing}
    if choice is None and differing:
        problems = [f"{name}: {info}" for name, info in infos.items()]
        raise CheckpointError(
            problem_list("tensors without importance scores differ between the inputs", problems)
            + "\nDecide with --unscored base, new or average"
        )
    whole = [name for name, info in infos.items() if not info.dtype.is_floating_point]
    if choice == "average" and whole:
        problems = [f"{name}: {infos[name]}" for name in whole]
        raise CheckpointError(
            problem_list("whole numbers that differ cannot be averaged", problems)
            + "\nDecide with --unscored base or new"
        )
