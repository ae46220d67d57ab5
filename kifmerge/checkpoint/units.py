"""Skill units on disk, and their values spread over the parameters that belong to them.

units.json   format and version; kind (tensor, lora-rank or layer); what is known of task, role and
             snapshot, and made_by; and one line for each unit:

    {"name": "m.q_proj[3]", "members": ["m.q_proj.lora_A.weight[3,:]",
     "m.q_proj.lora_B.weight[:,3]"], "score": 2.5e-09, "cumulative": 0.61}

A member is a whole tensor, by its name as in the checkpoint's own files; ``NAME[3,:]``, all its
elements whose first index is 3; or ``NAME[:,3]``, all whose second index is 3. An element belongs
to one unit at most, and a tensor that has members belongs to units as a whole. ``score`` is the new
task's, as it was measured; ``cumulative`` that of all tasks so far.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kifmerge.checkpoint.atomic import whole_file
from kifmerge.checkpoint.folder import Folder, as_folder
from kifmerge.checkpoint.header import TensorInfo, bytes_of
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.checkpoint.source import Source
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.tensor.units import UnitKind, slice_layout

FORMAT = "kifmerge.units"
VERSION = 1
DETAIL_FILE = "units.json"

_SLICE = re.compile(r"(.+)\[(?:(\d{1,15}),:|:,(\d{1,15}))\]", re.DOTALL)
_MOST_SHOWN = 60
_HEADER = ("format", "version", "kind", "units")


class Member(NamedTuple):
    """What belongs to a unit: a tensor, or its elements at one position along an axis.

    Attributes:
        tensor: name of the tensor.
        axis: 0 or 1; None for all of the tensor.
        position: along the axis; 0 for all of the tensor.
    """

    tensor: str
    axis: int | None = None
    position: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that share one score.

    Attributes:
        name: of the unit.
        members: as in :func:`member_text`.
        score: of the new task, as it was measured.
        cumulative: of all tasks so far.
    """

    name: str
    members: tuple[str, ...]
    score: float
    cumulative: float


@dataclass(frozen=True, slots=True)
class Units:
    """The skill units of a model.

    Attributes:
        kind: what a unit is.
        units: in the order of the model's files; their names differ.
        details: what else ``units.json`` says.
    """

    kind: UnitKind
    units: tuple[Unit, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


def member_text(member: Member) -> str:
    """A member as it is written.

    >>> member_text(Member("m.lora_A.weight", 0, 3)), member_text(Member("m.lora_B.weight", 1, 3))
    ('m.lora_A.weight[3,:]', 'm.lora_B.weight[:,3]')

    Raises:
        CheckpointError: the tensor's own name would be read as that of a part.
    """
    if _SLICE.fullmatch(member.tensor):
        raise CheckpointError(
            f"{member.tensor}: a tensor of this name cannot be a member of a skill unit, since it "
            "reads like a row or a column of another"
        )
    if member.axis is None:
        return member.tensor
    at = f"{member.position},:" if member.axis == 0 else f":,{member.position}"
    return f"{member.tensor}[{at}]"


def parse_member(text: str) -> Member:
    """Undo :func:`member_text`.

    >>> parse_member("m.lora_B.weight[:,3]")
    Member(tensor='m.lora_B.weight', axis=1, position=3)
    """
    found = _SLICE.fullmatch(text)
    if found is None:
        return Member(text)
    tensor, row, column = found.groups()
    return Member(tensor, 0, int(row)) if row is not None else Member(tensor, 1, int(column))


def write_units(directory: Path, units: Units, details: Mapping[str, Any] | None = None) -> None:
    """Write ``units.json``.

    Args:
        directory: made if need be.
        units: with finite scores.
        details: what is said beside, and in place of, the details that the units carry.

    Raises:
        ValueError: a score is not finite.
    """
    said = {k: v for k, v in {**units.details, **(details or {})}.items() if k not in _HEADER}
    header = {"format": FORMAT, "version": VERSION, "kind": units.kind, **said}
    opened = json.dumps(header, indent=2, ensure_ascii=False).removesuffix("\n}")
    with (
        whole_file(directory / DETAIL_FILE) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.write(f'{opened},\n  "units": [')
        for number, unit in enumerate(units.units):
            line = json.dumps(_as_json(unit), ensure_ascii=False, allow_nan=False)
            file.write(f"{',' if number else ''}\n    {line}")
        file.write("\n  ]\n}\n")


def _as_json(unit: Unit) -> dict[str, Any]:
    # Not asdict: it copies what it finds, and there may be a million units.
    return {
        "name": unit.name,
        "members": unit.members,
        "score": unit.score,
        "cumulative": unit.cumulative,
    }


def read_units(directory: Folder | str) -> Units:
    """Read the skill units of a folder.

    Raises:
        CheckpointError: none there, of a newer version, or damaged.
    """
    directory = as_folder(directory)
    path = directory / DETAIL_FILE
    try:
        content = read_details(path)
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read (nested too deeply)") from error
    if not content:
        raise CheckpointError(f"{directory} holds no skill units: no {DETAIL_FILE}")
    check_format(content, FORMAT, VERSION, path)
    kinds = typing.get_args(UnitKind)
    if content.get("kind") not in kinds:
        raise CheckpointError(
            f"{path}: kind: expected one of {', '.join(kinds)}, found {content.get('kind')!r}"
        )
    found = content.get("units")
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"{path}: units: expected a list of at least one unit")
    units, problems = [], []
    for number, entry in enumerate(found):
        try:
            units.append(_unit(entry))
        except ValueError as error:
            problems.append(f"units[{number}]: {error}")
    problems = problems or _owners(units)[1]
    if problems:
        raise CheckpointError(problem_list(f"{path} cannot be used", problems))
    details = {key: value for key, value in content.items() if key not in _HEADER}
    return Units(content["kind"], tuple(units), details)


def _unit(entry: object) -> Unit:
    """A unit from JSON.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    name, members = entry.get("name"), entry.get("members")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected text, found {_short(name)}")
    texts = members if isinstance(members, list) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name}: members: expected names, found {_short(members)}")
    return Unit(name, tuple(texts), _figure(entry, "score"), _figure(entry, "cumulative"))


def _figure(entry: Mapping[str, Any], key: str) -> float:
    value: Any = entry.get(key)
    largest = sys.float_info.max / 2  # so that what lies between two scores is finite too
    if type(value) not in (int, float) or not -largest <= value <= largest:  # NaN is nowhere
        raise ValueError(f"{entry['name']}: {key}: expected a finite number, found {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


@dataclass(slots=True)
class _Owners:
    """Which units a tensor belongs to: position along the axis -> number of the unit."""

    axis: int | None
    units: dict[int, int] = field(default_factory=dict)


def _owners(units: Sequence[Unit]) -> tuple[dict[str, _Owners], list[str]]:
    """Tensor -> its owners, and where two units claim one name or one element."""
    names: set[str] = set()
    owners: dict[str, _Owners] = {}
    problems = []
    for number, unit in enumerate(units):
        if unit.name in names:
            problems.append(f"{unit.name}: two units have this name")
        names.add(unit.name)
        for text in unit.members:
            tensor, axis, position = parse_member(text)
            found = owners.setdefault(tensor, _Owners(axis))
            if found.axis != axis:
                problems.append(f"{text}: other units have {tensor} in other parts")
            elif position in found.units:
                problems.append(f"{text}: belongs to {units[found.units[position]].name} already")
            else:
                found.units[position] = number
    return owners, problems


class _Spread(NamedTuple):
    """Values of a tensor's slices, and what slice an element lies in."""

    info: TensorInfo
    values: Tensor
    inner: int


class UnitSource:
    """A source in which each element of a parameter has the value of the unit it belongs to.

    Its names are those of the parameters that are members, in the order of another source, and on
    the devices of that.

    Args:
        units: the skill units.
        like: source that has all members, in the shapes that they must fit.
        values: one per unit: scores, which become float32 (normalise them, as raw ones may be too
            small for it), or bool.
        label: what :meth:`where` answers, such as the folder of the units.

    Raises:
        ValueError: not as many values as units.
        CheckpointError: members that ``like`` lacks, in other shapes, or only in part.
    """

    def __init__(
        self, units: Units, like: Source, values: Sequence[float] | Sequence[bool], label: str
    ) -> None:
        if len(values) != len(units.units):
            raise ValueError(f"{len(values)} values for {len(units.units)} units")
        self._label = label
        owners, problems = _owners(units.units)
        known = set(like.names())
        problems += [f"{name}: no such tensor" for name in owners if name not in known]
        problems += [
            problem
            for name in owners
            if name in known
            for problem in _misfit(name, owners[name], like.info(name).shape)
        ]
        if problems:
            raise CheckpointError(problem_list(f"{label} holds units of another model", problems))
        dtype = torch.bool if all(isinstance(value, bool) for value in values) else torch.float32
        self._spread = {
            name: _spread(like.info(name), owners[name], values, dtype)
            for name in like.names()
            if name in owners
        }

    def names(self) -> Sequence[str]:
        """Of the parameters that are members, in the order of the other source."""
        return tuple(self._spread)

    def info(self, name: str) -> TensorInfo:
        """Float32 or bool, and the shape of the parameter."""
        return self._find(name).info

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values of the units that these elements belong to."""
        info, values, inner = self._find(name)
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: elements {start} to {stop} of {info.numel}")
        if values.numel() == 1:
            return values.repeat(stop - start)
        element = torch.arange(start, stop, device=info.device)
        return values[element.div_(inner, rounding_mode="floor").remainder_(values.numel())]

    def where(self, name: str) -> str:
        """The label."""
        return self._label

    def fingerprint(self) -> str:
        """Of names, shapes and values."""
        whole = hashlib.sha256()
        for name, (info, values, inner) in self._spread.items():
            whole.update(f"{name} {info} {inner}\n".encode())
            whole.update(bytes_of(values.cpu()))
        return whole.hexdigest()

    @property
    def num_bytes(self) -> int:
        """What reading all of it reads from disk: nothing."""
        return 0

    def _find(self, name: str) -> _Spread:
        try:
            return self._spread[name]
        except KeyError:
            raise CheckpointError(f"{self._label}: {name} belongs to no skill unit") from None


def _misfit(name: str, owners: _Owners, shape: tuple[int, ...]) -> Iterator[str]:
    """What is wrong if a tensor of this shape is to have these owners."""
    if owners.axis is None:
        return
    if owners.axis >= len(shape):
        yield f"{name}: expected {owners.axis + 1} dimensions or more, found {list(shape)}"
        return
    size, what = shape[owners.axis], ("row", "column")[owners.axis]
    beyond = max(owners.units)
    if beyond >= size:
        yield f"{name}: {what} {beyond} belongs to a unit, found {list(shape)}"
    elif len(owners.units) < size:
        missing = next(number for number in range(size) if number not in owners.units)
        yield f"{name}: {what} {missing} belongs to no unit, found {list(shape)}"


def _spread(
    info: TensorInfo, owners: _Owners, values: Sequence[float] | Sequence[bool], dtype: torch.dtype
) -> _Spread:
    _, num_slices, inner = slice_layout(info.shape, owners.axis)
    of_slices = [values[owners.units[position]] for position in range(num_slices)]
    spread = torch.tensor(of_slices, dtype=dtype, device=info.device)
    return _Spread(TensorInfo(dtype, info.shape, info.device), spread, max(inner, 1))
