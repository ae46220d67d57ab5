"""Under which names, and in which pieces, the files of a checkpoint keep a model's parameters.

Files differ from the live model: without the prefix of the base model, with tied weights under
another name or under several, an adapter's factors without the adapter's name, stacked experts one
by one. What is measured on the live parameters is kept under the names of the files.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kifmerge.checkpoint.source import Source
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.models.parameters import as_in_checkpoint

_MOST_NAMES_SHOWN = 3
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGroup:
    """Parameters that are kept together: one, or those that files hold as one tensor.

    Attributes:
        parameters: their names in the model.
        names: name that ``save_pretrained`` writes -> names in the files, in the files' order; the
            name itself where they have none.
        is_converted: the files keep other pieces than the model, so that values must be converted.
        not_in_files: names that ``save_pretrained`` writes and the files lack.
    """

    parameters: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    is_converted: bool = False
    not_in_files: tuple[str, ...] = ()

    def file_names(self) -> Iterator[str]:
        """All names in files."""
        for names in self.names.values():
            yield from names


def saved_groups(
    model: nn.Module, parameters: Mapping[str, Tensor], files: Source | None
) -> list[SavedGroup]:
    """Find out how a checkpoint keeps some parameters; nothing of their values is looked at.

    Args:
        model: with the parameters.
        parameters: by their names in the model.
        files: of the checkpoint; None: as ``save_pretrained`` would write them.
    """
    empty = {name: torch.empty_like(value, device="meta") for name, value in parameters.items()}
    kept = list(_kept_together(model, empty))
    every = {name: value for _, saved in kept for name, value in saved.items()}
    found = names_in_files(model, every, files) if files is not None else {}
    return [
        SavedGroup(
            parameters=names,
            names={name: tuple(found.get(name) or [name]) for name in saved},
            is_converted=not any(value is empty[names[0]] for value in saved.values()),
            not_in_files=tuple(name for name in saved if name in found and not found[name]),
        )
        for names, saved in kept
    ]


def _kept_together(
    model: nn.Module, empty: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Parameters that belong together, with what ``save_pretrained`` writes of them."""
    of_tensor = {id(value): name for name, value in empty.items()}
    unchanged, together = {}, _Together()
    for name, value in as_in_checkpoint(model, empty).items():
        if id(value) in of_tensor:
            unchanged[of_tensor[id(value)]] = {name: value}
    for name, value in empty.items():
        if name not in unchanged:
            together.add(name, as_in_checkpoint(model, {name: value}))
    for name in empty:
        if name in unchanged:
            yield (name,), unchanged[name]
        elif names := together.pop(name):
            yield names, as_in_checkpoint(model, {n: empty[n] for n in names})


class _Together:
    """Parameters that end up in the same tensors of the files."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[str], set[str]]] = []

    def add(self, name: str, saved: Mapping[str, Tensor]) -> None:
        names, targets = [name], set(saved)
        apart = []
        for group in self._groups:
            if targets.isdisjoint(group[1]):
                apart.append(group)
            else:
                names, targets = [*group[0], *names], targets | group[1]
        self._groups = [*apart, (names, targets)]

    def pop(self, name: str) -> tuple[str, ...]:
        """The group of a parameter, the first time that one of its members asks."""
        found = next((group for group in self._groups if name in group[0]), None)
        if found is None:
            return ()
        self._groups.remove(found)
        return tuple(found[0])


def names_in_files(
    model: nn.Module, values: Mapping[str, Tensor], files: Source
) -> dict[str, list[str]]:
    """Under which names a checkpoint's files keep each parameter; none if it is not in them.

    Published files may differ from what ``save_pretrained`` would write: without the prefix of the
    base model, or with tied weights under another name or under several.

    Args:
        model: with the parameters.
        values: one tensor per parameter, under the name that ``save_pretrained`` would write.
        files: of the checkpoint.
    """
    kept = {name: files.info(name).shape for name in files.names()}
    tied: dict[int, list[str]] = {}
    of_name: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of_name[name] = tied.setdefault(id(parameter), [])
        of_name[name].append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, value in values.items():
        names = dict.fromkeys((name, *of_name.get(name, ())))
        shape = tuple(value.shape)
        found[name] = [n for n in names if kept.get(n) == shape] or [
            bare for bare in (n.removeprefix(prefix) for n in names) if kept.get(bare) == shape
        ]
    return found


def chosen(groups: Sequence[SavedGroup], patterns: Sequence[str]) -> list[SavedGroup]:
    """The groups, and of each the tensors, that have a name that matches a pattern.

    Args:
        groups: of all parameters.
        patterns: globs over whole names in the files; none chooses all.

    Raises:
        CheckpointError: a pattern that matches no name, with the nearest that would.
    """
    if not patterns:
        return list(groups)
    every = [name for group in groups for name in group.file_names()]
    unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in every)]
    if unmatched:
        problems = [f"{pattern}: try {_nearest(pattern, every)}" for pattern in unmatched]
        raise CheckpointError(problem_list("targets that match no parameter", problems))
    found = []
    for group in groups:
        names = {
            saved: in_files
            for saved, in_files in group.names.items()
            if any(fnmatch.fnmatchcase(n, p) for n in in_files for p in patterns)
        }
        missing = tuple(name for name in group.not_in_files if name in names)
        if names:
            found.append(replace(group, names=names, not_in_files=missing))
    return found


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Patterns like the given one that match: a part of a name in stars, or whole names."""
    part = pattern.strip("*")
    if part and any(part in name for name in names):
        return f"*{part}*"
    # The layers of a model have the same names but for their numbers.
    general = dict.fromkeys(_NUMBER.sub(".*.", name) for name in names)

    def likeness(name: str) -> tuple[int, int]:
        """How much of the pattern is in a name; of two the shorter one."""
        matcher = difflib.SequenceMatcher(None, pattern.lower(), name.lower(), autojunk=False)
        return sum(block.size for block in matcher.get_matching_blocks()), -len(name)

    return " or ".join(sorted(general, key=likeness, reverse=True)[:_MOST_NAMES_SHOWN])


class SavedTensors(Mapping[str, Tensor]):
    """Accumulators as ``KIND/NAME``, NAME as in the files, converted one group at a time.

    Args:
        model: with the parameters.
        state: accumulators as ``KIND/NAME``, NAME as in the model.
        groups: the keys, in their order.
    """

    def __init__(
        self, model: nn.Module, state: Mapping[str, Tensor], groups: Sequence[SavedGroup]
    ) -> None:
        self._model = model
        self._state = state
        self._places: dict[str, tuple[str, str, SavedGroup]] = {}
        kinds = dict.fromkeys(key.partition("/")[0] for key in state)
        for group in groups:
            for kind in kinds:
                for saved, in_files in group.names.items():
                    self._places |= {f"{kind}/{name}": (kind, saved, group) for name in in_files}
        self._converted: tuple[str, SavedGroup, Mapping[str, Tensor]] | None = None

    def __getitem__(self, key: str) -> Tensor:
        kind, saved, group = self._places[key]
        if not group.is_converted:
            return self._state[f"{kind}/{group.parameters[0]}"]
        last = self._converted
        if last is None or last[0] != kind or last[1] is not group:
            last = self._converted = None  # or two groups would be there at once
            values = {name: self._state[f"{kind}/{name}"] for name in group.parameters}
            last = self._converted = (kind, group, as_in_checkpoint(self._model, values))
        return last[2][saved]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def shards(tensors: Mapping[str, Tensor], files: Source | None) -> list[list[str]]:
    """Keys ``KIND/NAME``, by the file that holds the tensor NAME; what no file holds comes last.

    Args:
        tensors: their keys, in order.
        files: of the checkpoint; None: one file.
    """
    kept = set(files.names()) if files is not None else set()
    by_file: dict[str, list[str]] = {}
    rest = []
    for key in tensors:
        name = key.partition("/")[2]
        if files is not None and name in kept:
            by_file.setdefault(files.where(name), []).append(key)
        else:
            rest.append(key)
    found = [by_file[file] for file in sorted(by_file)] or [[]]
    found[-1] += rest
    return found
