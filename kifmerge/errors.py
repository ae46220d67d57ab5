"""The exceptions a user may meet, chosen by who must act, and the exit code of each.

    KifmergeError                 3  something the user can mend
    ├── RecipeError               3  edit the recipe
    ├── DataError                 3  mend a data file: the message names file and line
    ├── CheckpointError           3  mend, or choose, a checkpoint, adapter or snapshot
    ├── TrainingError             3  the model, optimizer or gradients cannot be trained this way
    ├── RunError                  3  the output folder is in the way, or belongs to another run
    └── TryAgainError             4  network, full disk: the same command may work later
        └── DamagedTransferError  4  bytes came otherwise than they were sent: none is kept

    ToldElsewhereError               what another process of the same work tells: see there

A message says what we were doing, what was found against what was expected, and what to do next.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any

MOST_PROBLEMS_SHOWN = 10

EXIT_BUG = 1
EXIT_INTERRUPTED = 130


class KifmergeError(Exception):
    """Something the user can mend. Base of every error raised on purpose."""

    exit_code = 3


class RecipeError(KifmergeError):
    """The recipe asks for something that does not exist or cannot be."""


class DataError(KifmergeError):
    """A data file cannot be used: names the file and the line."""


class CheckpointError(KifmergeError):
    """A checkpoint, adapter or snapshot cannot be used: names the file and the tensor."""


class TrainingError(KifmergeError):
    """The model, the optimizer or the gradients do not allow this training."""


class RunError(KifmergeError):
    """The output folder is occupied, locked, or belongs to a different run."""


class TryAgainError(KifmergeError):
    """Nothing is wrong with the request: the same command may work later."""

    exit_code = 4


class DamagedTransferError(TryAgainError):
    """Bytes came otherwise than they were sent: what was made of them must not be kept."""


class ToldElsewhereError(Exception):
    """An error that another process of the same work tells: this one ends without a word.

    Attributes:
        exit_code: of that error.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("told by another process")
        self.exit_code = exit_code


def check_choices(options: Any) -> None:
    """Refuse, for a dataclass of options, a Literal field that holds none of its values.

    A field of ``Literal[...] | None`` may be None too.

    Raises:
        ValueError: naming the field, what was found and what it may be.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else [hint]
        literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        may_be_none = type(None) in kinds and value is None
        if choices and value not in choices and not may_be_none:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(map(str, choices))}")


def check_at_least(options: Any, **smallest: float) -> None:
    """Refuse, for a dataclass of options, numbers below the given ones; None passes.

    Raises:
        ValueError: naming the field, what was found and what it must be at least.
    """
    for name, least in smallest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")


def problem_list(heading: str, problems: Sequence[str]) -> str:
    """Format gathered problems as one message, the first ten in full.

    >>> print(problem_list("data.jsonl", ["line 1: no output", "line 3: not JSON"]))
    data.jsonl:
      - line 1: no output
      - line 3: not JSON
    """
    lines = [f"{heading}:", *(f"  - {problem}" for problem in problems[:MOST_PROBLEMS_SHOWN])]
    if len(problems) > MOST_PROBLEMS_SHOWN:
        lines.append(f"  - and {len(problems) - MOST_PROBLEMS_SHOWN} more")
    return "\n".join(lines)
