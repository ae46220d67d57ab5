"""What an artifact was made from, compared with what lies there now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.reference import Reference, parse_reference

ParentState = Literal["unchanged", "changed", "damaged", "not here", "not recorded", "on the Hub"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """Something that an artifact was made from.

    Attributes:
        role: base, new, data...
        reference: as it was given then.
        state: whether what lies there now is what it was; ``not recorded`` if it had no digest;
            ``on the Hub`` at a commit, which cannot change.
    """

    role: str
    reference: str
    state: ParentState


def compare_parents(
    detail_paths: Iterable[Path], say: Callable[[str], None] = lambda text: None
) -> Iterator[Parent]:
    """Yield the parents that records of ours name, each once. Reads all of those on this disk.

    Args:
        detail_paths: JSON files with ``made_by``; those that cannot be read name none.
        say: told which parent is going to be read.
    """
    recorded: dict[tuple[str, str], Any] = {}
    for path in detail_paths:
        for role, parent in _recorded_parents(path).items():
            if isinstance(parent, dict):
                key = (str(role), str(parent.get("reference")))
                recorded.setdefault(key, parent.get("digest"))
    for (role, reference), expected in recorded.items():
        state = _state(reference, expected, say)
        yield Parent(role=role, reference=reference, state=state)


def _recorded_parents(path: Path) -> dict[str, Any]:
    try:
        made_by = read_details(path).get("made_by")
    except CheckpointError:
        return {}
    parents = made_by.get("parents") if isinstance(made_by, dict) else None
    return parents if isinstance(parents, dict) else {}


def _state(reference: str, expected: Any, say: Callable[[str], None]) -> ParentState:
    path = parse_reference(reference)
    if isinstance(path, Reference):
        return "on the Hub" if path.is_pinned else "not here"
    if not path.exists():
        return "not here"
    if expected is None:
        return "not recorded"
    say(f"comparing {reference}")
    try:
        return "unchanged" if digest(path) == expected else "changed"
    except (CheckpointError, OSError):
        return "damaged"


def refuse_unexpected(made: Mapping[str, Any], expected: Mapping[str, Any] | None) -> None:
    """Refuse to hand over another checkpoint than the one that was to be made again.

    Raises:
        CheckpointError: inputs that have changed, or files that came out otherwise.
    """
    if expected is None:
        return
    parents, wanted = made["made_by"]["parents"], expected["made_by"]["parents"]
    problems = [
        f"{role} {parents[role]['reference']}: {parents[role]['digest']}, "
        f"expected {wanted[role]['digest']}"
        for role in parents
        if parents[role]["digest"] != wanted.get(role, {}).get("digest")
    ]
    if problems:
        raise CheckpointError(problem_list("inputs are not what they were", problems))
    found, told = made["files"], expected.get("files") or made["files"]
    problems = [
        f"{name}: {_file_word(found.get(name))}, expected {_file_word(told.get(name))}"
        for name in sorted({*found, *told})
        if found.get(name) != told.get(name)
    ]
    if problems:
        raise CheckpointError(
            problem_list(
                "the inputs are the same, but not what came of them: made by kifmerge "
                f"{expected.get('kifmerge')}, this is {made['kifmerge']}",
                problems,
            )
        )


def _file_word(record: Mapping[str, Any] | None) -> str:
    return "no such file" if record is None else f"SHA-256 {record['sha256']}"
