"""A folder of a repository at one commit: what it holds, and its files, brought or streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import huggingface_hub

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub.client import Say, hub_api, hub_errors, is_offline, patiently, silent
from kifmerge.hub.download import cached_path, download
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.reference import Reference
from kifmerge.hub.stream import FileStream

Fetch = Literal["auto", "download", "stream"]
Result = TypeVar("Result")

# A cached commit is found by any of these, which every kind of folder has one of.
_WITNESSES = (
    "config.json", "adapter_config.json", "importance.json", "mask.json", "units.json",
    "kifmerge.json", "README.md", ".gitattributes",
)  # fmt: skip


class HubFolder:
    """A folder of a repository, at one commit.

    Small files come through the standard cache, ``folder / name`` being their path there. Weights
    are read through :meth:`open`: from the cache if they are in it, else as ``fetch`` says.

    Args:
        reference: pinned to a commit.
        files: name -> file, of all that is in it.
        fetch: ``download`` brings weights into the cache, each file when its turn comes;
            ``stream`` pulls the ranges that are read, and keeps nothing; ``auto`` is to be settled
            before tensors are read, see :meth:`settle`.
        say: told what is worth knowing.

    Attributes:
        reference: pinned to a commit.
        files: name -> file.
    """

    def __init__(
        self,
        reference: Reference,
        files: Mapping[str, HubFile],
        fetch: Fetch = "auto",
        say: Say = silent,
    ) -> None:
        self.reference = reference
        self.files = files
        self.fetch: Fetch = fetch
        self.say = say
        self._opened: dict[str, RemoteFile] = {}

    def __str__(self) -> str:
        return str(self.reference)

    def __truediv__(self, name: str) -> Path:
        """Where a file is on this disk, once it has been brought here.

        A path where nothing is, if the folder has no such file.

        Raises:
            CheckpointError: it cannot be had.
            TryAgainError: network or server failed.
        """
        file = self.files.get(name)
        return Path(f"{self}/{name}") if file is None else download(file, self.say)

    def open(self, name: str) -> RemoteFile:
        """A file whose bytes are read in parts."""
        if name not in self._opened:
            self._opened[name] = RemoteFile(self, self.files[name])
        return self._opened[name]

    def settle(self, fetch: Literal["download", "stream"]) -> None:
        """Choose how weights are read, where that was left open."""
        if self.fetch == "auto":
            self.fetch = fetch

    @property
    def unchecked(self) -> list[str]:
        """Names of files that came in an order in which no hash could be taken."""
        return [name for name, file in self._opened.items() if file.is_unchecked]


class RemoteFile:
    """A file of a repository whose bytes are read in parts. Safe to read from in threads."""

    def __init__(self, folder: HubFolder, file: HubFile) -> None:
        self._folder = folder
        self._file = file
        self._path = cached_path(file.reference, file.name)
        self._stream = FileStream(file, folder.say)

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self._file)

    @property
    def size(self) -> int:
        """In bytes."""
        return self._file.size

    @property
    def is_here(self) -> bool:
        """Whether reading it needs no network."""
        return self._path is not None

    @property
    def is_unchecked(self) -> bool:
        """Whether it was streamed in an order in which no hash could be taken."""
        return self._stream.is_unchecked

    def head(self, num_bytes: int) -> bytes:
        """The first bytes, which do not settle how the others are read."""
        if self._path is not None:
            with self._path.open("rb") as stream:
                return stream.read(num_bytes)
        return self._stream.head(num_bytes)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell which ranges will be read; those that follow one another are pulled together."""
        self._stream.expect(ranges)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be had.
            TryAgainError: network or server failed, or what came is damaged.
        """
        if self._path is None and self._folder.fetch != "stream":
            self._path = download(self._file, self._folder.say)
        if self._path is not None:
            _read_into(self._path, offset, view)
            return
        self._stream.read_into(offset, view)


def _read_into(path: Path, offset: int, view: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        while view:
            num_read = os.preadv(file.fileno(), [view], offset)
            if num_read == 0:
                raise CheckpointError(f"{path}: ends before byte {offset + len(view)}")
            view, offset = view[num_read:], offset + num_read


def open_hub_folder(reference: Reference, fetch: Fetch = "auto", say: Say = silent) -> HubFolder:
    """Resolve a reference to a commit, once, and list what the folder holds.

    Offline, and where the network fails, what the cache holds of it is taken.

    Raises:
        CheckpointError: no such repository, revision or folder, or no access.
        TryAgainError: network or server failed, and the cache holds nothing of it.
    """
    cached = _cached(reference)
    if is_offline() and cached is not None:
        return HubFolder(*cached, fetch, say)
    try:
        commit = _resolve(reference, is_cached=cached is not None)
        pinned = reference.pinned(commit)
        return HubFolder(pinned, _listed(pinned, is_cached=cached is not None), fetch, say)
    except TryAgainError as error:
        if cached is None:
            raise
        say(f"{error}: taking what the cache holds, {cached[0]}")
        return HubFolder(*cached, fetch, say)


def _resolve(reference: Reference, *, is_cached: bool) -> str:
    """The commit that a reference names at this moment."""
    if reference.is_pinned and reference.revision is not None:
        return reference.revision

    def ask() -> str | None:
        found = hub_api().repo_info(
            reference.repo_id, repo_type=reference.kind, revision=reference.revision
        )
        return found.sha

    commit = _called(ask, f"looking up {reference}", is_cached=is_cached)
    if commit is None:
        raise CheckpointError(f"{reference}: the Hub does not say which commit it is at")
    return commit


def _listed(reference: Reference, *, is_cached: bool) -> dict[str, HubFile]:
    """All files of a folder at a commit."""

    def ask() -> list[Any]:
        return list(
            hub_api().list_repo_tree(
                reference.repo_id,
                reference.folder or None,
                recursive=True,
                revision=reference.revision,
                repo_type=reference.kind,
            )
        )

    entries = _called(ask, f"listing {reference}", is_cached=is_cached)
    start = len(reference.folder) + 1 if reference.folder else 0
    files = {}
    for entry in entries:
        name = entry.path[start:]
        if not isinstance(entry, huggingface_hub.RepoFile):
            continue
        if {"", ".", ".."} & set(name.split("/")) or "\\" in name:
            raise CheckpointError(f"{reference}: {entry.path!r} is no path of a file in a folder")
        sha256 = None if entry.lfs is None else entry.lfs.sha256
        files[name] = HubFile(
            reference=reference, name=name, size=entry.size, sha256=sha256, git_oid=entry.blob_id
        )
    return files


def _called(call: Callable[[], Result], what: str, *, is_cached: bool) -> Result:
    """With patience, unless the cache helps out."""
    if not is_cached:
        return patiently(call, what)
    with hub_errors(what):
        return call()


def _cached(reference: Reference) -> tuple[Reference, dict[str, HubFile]] | None:
    """What the cache holds of a folder, without a word to the network."""
    for witness in _WITNESSES:
        path = cached_path(reference, witness)
        if path is None:
            continue
        folder = path.parent
        commit = folder.parents[reference.folder.count("/")] if reference.folder else folder
        pinned = reference.pinned(commit.name)
        names = {
            found.relative_to(folder).as_posix(): found.stat().st_size
            for found in sorted(folder.rglob("*"))
            if found.is_file()
        }
        return pinned, {
            name: HubFile(reference=pinned, name=name, size=size, sha256=None, git_oid=None)
            for name, size in names.items()
        }
    return None
