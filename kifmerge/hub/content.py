"""Whether bytes that came are those of the repository: SHA-256, or git's own hash."""

from __future__ import annotations

import bisect
import hashlib
import threading
from array import array
from pathlib import Path
from typing import Any

import xxhash

from kifmerge.errors import DamagedTransferError

_READ_BYTES = 1 << 20
_DIGEST_BYTES = 16
_ADVICE = "Try again; if it goes on, a proxy or the disk damages them"


class ContentCheck:
    """Compares a file that comes in parts with what the repository says of it.

    Parts may come in about the order of the file: those that come before their turn are kept. A
    part that comes again is compared with what it was the first time. Safe to feed from threads.

    Args:
        label: of the file, for messages.
        size: in bytes.
        sha256: of its content; None of a file that is kept in git itself.
        git_oid: git's hash of its content, which counts where there is no SHA-256.

    Attributes:
        has_passed: the whole file came, and is the repository's.
    """

    def __init__(self, label: str, size: int, sha256: str | None, git_oid: str | None) -> None:
        self._label = label
        self._size = size
        self._expected = sha256 or git_oid
        self._position = 0
        self._hash = _new_hash(size, sha256)
        # Where the parts end that were hashed, the first of which begins at 0; and their digests:
        # states of hashes, and objects for each, would take gigabytes in very large merges.
        self._ends = array("Q", [0])
        self._digests = bytearray()
        self._pending: dict[int, Any] = {}
        self._damage: DamagedTransferError | None = None
        self._lock = threading.Lock()
        self.has_passed = False
        self._compare_whole()

    def feed(self, start: int, content: Any) -> None:
        """Take in a part, which must not change afterwards.

        Raises:
            DamagedTransferError: what came so far is not the repository's file.
        """
        with self._lock:
            if start < self._position < start + len(content):
                start, content = self._position, content[self._position - start :]
            if start < self._position:
                self._compare_again(start, content)
            elif start > self._position:
                self._pending[start] = content
            else:
                self._take(content)
                while (following := self._pending.pop(self._position, None)) is not None:
                    self._take(following)
        self.refuse_damage()

    def refuse_damage(self) -> None:
        """Refuse what has been found damaged, whoever asks.

        Raises:
            DamagedTransferError: it has.
        """
        if self._damage is not None:
            raise self._damage

    def is_pending(self, start: int) -> bool:
        """Whether the part that begins there is kept."""
        return start in self._pending

    def forget_pending(self) -> None:
        """Keep parts no longer: the hash goes on only if they come again."""
        with self._lock:
            self._pending.clear()

    def _take(self, content: Any) -> None:
        if not len(content):
            return
        self._hash.update(content)
        self._position += len(content)
        self._ends.append(self._position)
        self._digests += _digest(content)
        self._compare_whole()

    def _compare_whole(self) -> None:
        if self._position < self._size or self._expected is None:
            return
        self.has_passed = self._hash.hexdigest() == self._expected
        if not self.has_passed:
            self._damage = DamagedTransferError(_damaged(self._label, self._expected, self._hash))

    def _compare_again(self, start: int, content: Any) -> None:
        first, last = self._part_at(start), self._part_at(start + len(content))
        if first is None or last is None:
            return
        again = b"".join(
            _digest(content[self._ends[part] - start : self._ends[part + 1] - start])
            for part in range(first, last)
        )
        if again != self._digests[first * _DIGEST_BYTES : last * _DIGEST_BYTES]:
            self._damage = DamagedTransferError(
                f"{self._label}: bytes {start} to {start + len(content)} came twice, and not "
                f"alike. {_ADVICE}"
            )

    def _part_at(self, start: int) -> int | None:
        """Number of the part that begins at a byte; None if none does."""
        number = bisect.bisect_left(self._ends, start)
        is_found = number < len(self._ends) and self._ends[number] == start
        return number if is_found else None


def check_content(path: Path, label: str, size: int, sha256: str | None, oid: str | None) -> None:
    """Compare a file on the disk with what the repository says of it.

    Raises:
        DamagedTransferError: it is another.
    """
    found = path.stat().st_size
    if found != size:
        raise DamagedTransferError(f"{label}: expected {size} bytes, {found} came")
    content = _new_hash(size, sha256)
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            content.update(block)
    expected = sha256 or oid
    if expected not in (None, content.hexdigest()):
        raise DamagedTransferError(_damaged(label, expected, content))


def _damaged(label: str, expected: str | None, content: Any) -> str:
    return (
        f"{label}: the bytes that came are not those of the repository: expected hash {expected}, "
        f"found {content.hexdigest()}. {_ADVICE}"
    )


def _digest(content: Any) -> bytes:
    """Of a part alone, to know it again; the whole is what its SHA-256 vouches for."""
    return xxhash.xxh3_128_digest(content)


def _new_hash(size: int, sha256: str | None) -> Any:
    if sha256 is not None:
        return hashlib.sha256()
    content = hashlib.sha1(usedforsecurity=False)  # as git does
    content.update(f"blob {size}\0".encode())
    return content
