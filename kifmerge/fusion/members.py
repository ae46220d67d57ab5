"""Membership: which skill units a model has, and which parameters belong to each.

tensor      every tensor is a unit
lora-rank   row r of a module's lora_A with column r of its lora_B; tensors that are no factor are
            units of their own
layer       all tensors of a layer

Tensors without elements belong to no unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kifmerge.checkpoint.source import Source
from kifmerge.checkpoint.units import Member
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.fusion.layers import layer_of, natural_order
from kifmerge.tensor.units import UnitKind, lora_factor

# Unit -> its members, in natural order.
Members = Mapping[str, Sequence[Member]]


def unit_members(scores: Source, kind: UnitKind) -> Members:
    """The units of a model and their members, from names and shapes alone.

    Raises:
        CheckpointError: no scores, or LoRA factors that make no ranks.
    """
    shapes = {name: scores.info(name).shape for name in scores.names()}
    names = sorted((name for name, s in shapes.items() if math.prod(s)), key=natural_order)
    if not names:
        raise CheckpointError("no parameter has scores: there is nothing to group")
    if kind == "lora-rank":
        return _rank_members(names, shapes)
    members: dict[str, list[Member]] = {}
    for name in names:
        members.setdefault(name if kind == "tensor" else layer_of(name), []).append(Member(name))
    return members


def _rank_members(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Members:
    modules: dict[str, dict[str, str]] = {}  # module, or tensor that is no factor -> side -> name
    for name in names:
        factor = lora_factor(name)
        side = "" if factor is None else factor.side
        modules.setdefault(name if factor is None else factor.module, {})[side] = name
    problems = [p for module, of in modules.items() for p in _factor_problems(module, of, shapes)]
    if not problems and all("" in tensors for tensors in modules.values()):
        problems = ["no tensor is a LoRA factor: group by tensor or by layer"]
    if problems:
        raise CheckpointError(problem_list("the scores cannot be grouped by LoRA rank", problems))
    members: dict[str, list[Member]] = {}
    for module, tensors in modules.items():
        if "" in tensors:
            members[module] = [Member(tensors[""])]
            continue
        for rank in range(shapes[tensors["A"]][0]):
            rank_members = [Member(tensors["A"], 0, rank), Member(tensors["B"], 1, rank)]
            members[f"{module}[{rank}]"] = rank_members
    return members


def _factor_problems(
    module: str, tensors: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What keeps the factors of a module from making ranks."""
    if "" in tensors:
        if len(tensors) > 1:
            yield f"{module}: is both a tensor and a module with LoRA factors"
        return
    for side, other in (("A", "B"), ("B", "A")):
        if side not in tensors:
            yield f"{tensors[other]}: the scores hold no lora_{side} that belongs to it"
            return
        if len(shapes[tensors[side]]) < 2:
            yield f"{tensors[side]}: expected a matrix, found {list(shapes[tensors[side]])}"
            return
    row_shape, column_shape = shapes[tensors["A"]], shapes[tensors["B"]]
    if row_shape[0] != column_shape[1]:
        yield (
            f"{module}: expected as many columns of lora_B as rows of lora_A, "
            f"found {list(row_shape)} and {list(column_shape)}"
        )
