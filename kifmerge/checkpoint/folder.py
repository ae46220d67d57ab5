"""Folders that are read: on this disk, or in a repository on the Hub.

folder / name           path of a small file; a Hub's is brought here first
open_file(folder, name) a file read in parts: of weights, whose size matters
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from kifmerge.errors import CheckpointError
from kifmerge.hub.client import Say, silent
from kifmerge.hub.folder import Fetch, HubFolder, open_hub_folder
from kifmerge.hub.reference import Reference, parse_reference

Folder: TypeAlias = Path | HubFolder


class File(Protocol):
    """A file of which any bytes can be read. Safe to read from in threads."""

    @property
    def label(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def head(self, num_bytes: int) -> bytes:
        """The first bytes, or all of a shorter file."""
        ...

    def compare_head(self) -> None:
        """Where the first bytes came over the network, see whether they come again as they came.

        Raises:
            DamagedTransferError: they do not.
        """
        ...

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell which ranges are going to be read, in about their order."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on.

        Raises:
            CheckpointError: they cannot be read, or the file has changed.
        """
        ...


class LocalFile:
    """A file on this disk, which must not change while it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._state = _state(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    @property
    def label(self) -> str:
        """Its path."""
        return str(self._path)

    @property
    def size(self) -> int:
        """When it was opened."""
        return self._state[0]

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        content = bytearray(min(num_bytes, self.size))
        self.read_into(0, memoryview(content))
        return bytes(content)

    def compare_head(self) -> None:
        """Nothing."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing: the system reads ahead."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Read from the disk.

        Raises:
            CheckpointError: it cannot be read, or has changed.
        """
        path = self._path
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _state(os.fstat(descriptor)) != self._state:
                    raise CheckpointError(f"{path}: changed while it was being read")
                while view:
                    num_read = os.preadv(descriptor, [view], offset)
                    if num_read == 0:
                        raise CheckpointError(f"{path}: truncated while it was being read")
                    view, offset = view[num_read:], offset + num_read
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


class Folders:
    """Opens references; the same one twice is the same folder, at one commit.

    Args:
        fetch: how weights on the Hub are read.
        say: told what is worth knowing.

    Attributes:
        say: as given.
    """

    def __init__(self, fetch: Fetch = "auto", say: Say = silent) -> None:
        self._fetch = fetch
        self.say = say
        self._opened: dict[Reference, HubFolder] = {}

    def open(self, text: str | Path) -> Folder:
        """The folder that a reference names. A path need not exist.

        Raises:
            CheckpointError: no such repository, revision or folder, or no access.
            TryAgainError: network or server failed.
        """
        reference = parse_reference(text)
        if isinstance(reference, Path):
            return reference
        if reference not in self._opened:
            try:
                self._opened[reference] = open_hub_folder(reference, self._fetch, self.say)
            except CheckpointError as error:
                if str(text).startswith("hf://"):
                    raise
                raise CheckpointError(
                    f"{text}: no such folder here; on the Hub, {error}"
                ) from error
        return self._opened[reference]

    def open_each(self, texts: Mapping[str, str | Path]) -> dict[str, Folder]:
        """Role -> folder."""
        return {role: self.open(text) for role, text in texts.items()}


def as_folder(reference: Folder | str) -> Folder:
    """A folder as it is, or the one that a text names."""
    return Folders().open(reference) if isinstance(reference, str) else reference


def open_file(folder: Folder, name: str) -> File:
    """A file of a folder, to be read in parts.

    Raises:
        CheckpointError: there is none.
    """
    return LocalFile(folder / name) if isinstance(folder, Path) else folder.open(name)


def file_sizes(folder: Folder, inner: str = "") -> dict[str, int]:
    """Name -> bytes of the files directly in a folder, or in one in it, in the order of names."""
    if isinstance(folder, Path):
        directory = folder / inner
        files = sorted(p for p in directory.iterdir() if p.is_file()) if directory.is_dir() else []
        return {path.name: path.stat().st_size for path in files}
    start = f"{inner}/" if inner else ""
    sizes = {
        name.removeprefix(start): file.size
        for name, file in sorted(folder.files.items())
        if name.startswith(start)
    }
    return {name: size for name, size in sizes.items() if "/" not in name}


def inner_folders(folder: Folder) -> list[str]:
    """Names of the folders directly in a folder, in order."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    return sorted({name.partition("/")[0] for name in folder.files if "/" in name})


def has_file(folder: Folder, name: str) -> bool:
    """Whether a folder holds a file, which is not brought here for that."""
    return (folder / name).is_file() if isinstance(folder, Path) else name in folder.files


def is_folder(folder: Folder) -> bool:
    """Whether there is such a folder."""
    return folder.is_dir() if isinstance(folder, Path) else bool(folder.files)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
