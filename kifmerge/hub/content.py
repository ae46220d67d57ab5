"""Whether bytes that came are those of the repository: SHA-256, or git's own hash."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from kifmerge.errors import DamagedTransferError

_READ_BYTES = 1 << 20
# Parts that come before their turn wait to be hashed as long as they are few.
_MOST_PENDING_BYTES = 1 << 25


class ContentCheck:
    """Compares a file that comes in parts with what the repository says of it.

    Parts may come in about the order of the file; those of another pass over it are left out,
    unless it begins again at the start of the second part. Safe to feed from threads.

    Args:
        label: of the file, for messages.
        size: in bytes.
        sha256: of its content; None of a file that is kept in git itself.
        git_oid: git's hash of its content, which counts where there is no SHA-256.
    """

    def __init__(self, label: str, size: int, sha256: str | None, git_oid: str | None) -> None:
        self._label = label
        self._size = size
        self._expected = sha256 or git_oid
        self._hash: Any = _new_hash(size, sha256)
        self._position = 0
        # Where the first part ended, from which another pass goes on.
        self._first: tuple[int, Any] | None = None
        self._pending: dict[int, Any] = {}
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self.has_given_up = False

    def feed(self, start: int, content: Any) -> None:
        """Take in a part.

        Raises:
            DamagedTransferError: all parts are there, and they are not the repository's file.
        """
        with self._lock:
            if self.has_given_up:
                return
            if self._first is not None and self._position == self._size and start == self._first[0]:
                self._position, self._hash = self._first[0], self._first[1].copy()
            if start > self._position:
                self._keep(start, content)
            if start != self._position:
                return
            self._take(content)
            if self._first is None:
                self._first = (self._position, self._hash.copy())
            while (following := self._pending.pop(self._position, None)) is not None:
                self._pending_bytes -= len(following)
                self._take(following)
            if self._position == self._size and self._expected not in (
                None,
                self._hash.hexdigest(),
            ):
                raise DamagedTransferError(
                    f"{self._label}: the bytes that came are not those of the repository: expected "
                    f"hash {self._expected}, found {self._hash.hexdigest()}. Try again; if it goes "
                    "on, a proxy or the disk damages them"
                )

    def _take(self, content: Any) -> None:
        self._hash.update(content)
        self._position += len(content)

    def _keep(self, start: int, content: Any) -> None:
        self._pending[start] = content
        self._pending_bytes += len(content)
        if self._pending_bytes > _MOST_PENDING_BYTES:
            self.has_given_up, self._pending = True, {}


def check_content(path: Path, label: str, size: int, sha256: str | None, oid: str | None) -> None:
    """Compare a file on the disk with what the repository says of it.

    Raises:
        DamagedTransferError: it is another.
    """
    found = path.stat().st_size
    if found != size:
        raise DamagedTransferError(f"{label}: expected {size} bytes, {found} came")
    check = ContentCheck(label, size, sha256, oid)
    position = 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            check.feed(position, block)
            position += len(block)


def _new_hash(size: int, sha256: str | None) -> Any:
    if sha256 is not None:
        return hashlib.sha256()
    content = hashlib.sha1(usedforsecurity=False)  # as git does
    content.update(f"blob {size}\0".encode())
    return content
