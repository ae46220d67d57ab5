"""A folder of a repository at one commit: what it holds, and its files, brought or streamed."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub.background import in_own_thread, result_of
from kifmerge.hub.client import Say, is_offline, silent
from kifmerge.hub.download import cached_file, download, note_revision
from kifmerge.hub.listing import WEIGHTS_SUFFIX, find_cached, list_files
from kifmerge.hub.ranges import HubFile, NoRangesError
from kifmerge.hub.reference import Reference
from kifmerge.hub.stream import FileStream, Shelf

Fetch = Literal["auto", "download", "stream"]


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
        asked: the reference before it was pinned.

    Attributes:
        reference: pinned to a commit.
        files: name -> file.
        shelf: what its streams share.
        serves_ranges: False once whole files have come where ranges were asked for.
    """

    def __init__(
        self,
        reference: Reference,
        files: Mapping[str, HubFile],
        fetch: Fetch = "auto",
        say: Say = silent,
        asked: Reference | None = None,
    ) -> None:
        self.reference = reference
        self.files = files
        self.fetch: Fetch = fetch
        self.say = say
        self.shelf = Shelf()
        self.serves_ranges = True
        self._asked = asked or reference
        self._is_noted = False
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
        return self.bring(name) if name in self.files else Path(f"{self}/{name}")

    def open(self, name: str) -> RemoteFile:
        """A file whose bytes are read in parts."""
        if name not in self._opened:
            self._opened[name] = RemoteFile(self, self.files[name])
        return self._opened[name]

    def bring(self, name: str) -> Path:
        """Where a file is in the cache, once it has been brought there.

        Raises:
            CheckpointError: it cannot be had.
            TryAgainError: network or server failed.
        """
        path = download(self.files[name], self.say)
        # Where only small files are kept, an earlier copy may be the better one to be offline with.
        if name.endswith(WEIGHTS_SUFFIX):
            self.note_revision(name)
        return path

    def note_revision(self, name: str) -> None:
        """Let the cache know the commit by the name it was asked for: offline that is enough.

        Args:
            name: of a file that is in the cache.
        """
        if not self._is_noted:
            self._is_noted = True
            note_revision(self._asked, self.reference, name)

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
        self._path = cached_file(file)
        self._coming: Future[Path] | None = None
        self._lock = threading.Lock()
        self._stream = FileStream(file, folder.say, folder.shelf)

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
        """The first bytes, which do not settle how the others are read.

        Raises:
            CheckpointError: the file cannot be had.
            TryAgainError: network or server failed, or what came is damaged.
        """
        if self._path is None and self._folder.serves_ranges:
            try:
                return self._stream.head(num_bytes)
            except NoRangesError:
                if self._folder.fetch == "stream":
                    raise
                self._folder.serves_ranges = False
        if self._path is None:
            self._path = self._brought()
        content = bytearray(min(num_bytes, self.size))
        _read_into(self._path, 0, memoryview(content))
        return bytes(content)

    def compare_head(self) -> None:
        """See whether the first bytes come again as they came; nothing for a file in the cache.

        Raises:
            DamagedTransferError: they do not.
            TryAgainError: network or server failed.
        """
        if self._path is None:
            self._stream.compare_head()

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
            self._path = self._brought()
        if self._path is None:
            self._stream.read_into(offset, view)
        else:
            _read_into(self._path, offset, view)

    def _brought(self) -> Path:
        with self._lock:
            if self._coming is None:
                bring = functools.partial(self._folder.bring, self._file.name)
                self._coming = in_own_thread(bring)
            coming = self._coming
        try:
            return result_of(coming)
        except Exception:
            with self._lock:
                if coming.done() and self._coming is coming:
                    self._coming = None  # whoever tries again fetches it again
            raise


def _read_into(path: Path, offset: int, view: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            while view:
                num_read = os.preadv(file.fileno(), [view], offset)
                if num_read == 0:
                    raise CheckpointError(f"{path}: ends before byte {offset + len(view)}")
                view, offset = view[num_read:], offset + num_read
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def open_hub_folder(reference: Reference, fetch: Fetch = "auto", say: Say = silent) -> HubFolder:
    """Resolve a reference to a commit, once, and list what the folder holds.

    Offline, and where the network fails, what the cache holds of it is taken.

    Raises:
        CheckpointError: no such repository, revision or folder, or no access.
        TryAgainError: network or server failed, and the cache holds nothing of it, or only a part.
    """
    cached = find_cached(reference)
    if is_offline() and cached is not None:
        return HubFolder(cached.reference, cached.files, fetch, say)
    try:
        pinned, files = list_files(reference, say, is_cached=cached is not None)
        return HubFolder(pinned, files, fetch, say, reference)
    except TryAgainError as error:
        if cached is None or not cached.is_whole:
            raise
        say(f"{error}: taking what the cache holds, {cached.reference}")
        return HubFolder(cached.reference, cached.files, fetch, say)
