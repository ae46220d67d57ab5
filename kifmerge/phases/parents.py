"""What an artifact was made from, compared with what lies there now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import CheckpointError

ParentState = Literal["unchanged", "changed", "damaged", "not here", "not recorded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """Something that an artifact was made from.

    Attributes:
        role: base, new, data...
        reference: as it was given then.
        state: whether what lies there now is what it was; ``not recorded`` if it had no digest.
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
    path = Path(reference)
    if not path.exists():
        return "not here"
    if expected is None:
        return "not recorded"
    say(f"comparing {reference}")
    try:
        return "unchanged" if digest(path) == expected else "changed"
    except (CheckpointError, OSError):
        return "damaged"
