"""Where a made folder goes: onto this disk, or into a repository on the Hub, file by file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.journal import refuse_occupied, remove_finished
from kifmerge.checkpoint.provenance import is_made, read_details, refuse_inputs_inside
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.shared_folder import shared_resumable_folder


class Work(Protocol):
    """A folder that is being filled."""

    directory: Path

    @property
    def finished(self) -> Mapping[str, Mapping[str, Any]]:
        """File name -> what was noted when it was finished."""
        ...

    @property
    def holds_one(self) -> bool:
        """Whether a noted file leaves this disk, so that there should never be two."""
        ...

    def note(self, record: Mapping[str, Any]) -> None:
        """Note a finished file: its ``name``, ``num_bytes`` and ``sha256``, and whatever else.

        Raises:
            CheckpointError: it cannot be sent where it goes.
            TryAgainError: network or server failed.
        """
        ...

    def refuse_full_disk(self, sizes: Iterable[int]) -> None:
        """Refuse to begin what cannot end for lack of space.

        Args:
            sizes: of the files that are still to be written.

        Raises:
            TryAgainError: less is free.
        """
        ...


class Destination(Protocol):
    """Where a made folder goes."""

    @property
    def repository(self) -> str | None:
        """The repository that it goes to; None for a folder on this disk."""
        ...

    def refuse_inputs(self, parents: Iterable[Folder | None]) -> None:
        """Refuse inputs that would be overwritten.

        Raises:
            RunError: naming both.
        """
        ...

    def find_made(
        self, detail_file: str, wanted: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Content of the JSON of what is there, if it is what a command is about to make.

        Args:
            detail_file: its JSON.
            wanted: result of :func:`kifmerge.checkpoint.provenance.made_by`; asked for only where
                there is something.

        Raises:
            RunError: something else is there, and is not to be overwritten.
        """
        ...

    def begin(self, work: Mapping[str, Any]) -> contextlib.AbstractContextManager[Work]:
        """Give a folder to fill; on success it goes where it belongs, whole.

        Args:
            work: plain JSON that says what is being made: all that the files depend on.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDestination:
    """A folder on this disk.

    Attributes:
        path: of the folder.
        resume: go on from the files that an interrupted call has finished.
        overwrite: what it holds may go, once the new folder is whole.
        ranks: fill it together.
    """

    path: Path
    resume: bool = False
    overwrite: bool = False
    ranks: Ranks = ALONE

    @property
    def repository(self) -> str | None:
        """None."""
        return None

    def refuse_inputs(self, parents: Iterable[Folder | None]) -> None:
        """Refuse to be one of them, or to hold one."""
        refuse_inputs_inside(self.path, parents)

    def find_made(
        self, detail_file: str, wanted: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Compare what the folder holds."""
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if occupied and is_made(self.path, detail_file, wanted(), overwrite=self.overwrite):
            remove_finished(self.path)
            return read_details(self.path / detail_file)
        refuse_occupied(self.path, overwrite=self.overwrite)
        return None

    def begin(self, work: Mapping[str, Any]) -> contextlib.AbstractContextManager[Work]:
        """See :func:`kifmerge.checkpoint.shared_folder.shared_resumable_folder`."""
        return shared_resumable_folder(
            self.path, work, self.ranks, resume=self.resume, overwrite=self.overwrite
        )
