"""Bytes of a file on the Hub by HTTP range: checked, and asked for again when something breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants

from kifmerge.errors import CheckpointError, DamagedTransferError
from kifmerge.hub.client import (
    LIBRARY,
    PassingError,
    Patience,
    Say,
    asked_seconds,
    hub_api,
    hub_errors,
    is_passing,
    patiently,
    silent,
)
from kifmerge.hub.reference import Reference

# An attempt in which less came has brought us no further: else a connection that is cut after a
# few bytes, again and again, would be endured for days.
_LEAST_PROGRESS_BYTES = 1 << 16
# What an address answers that has expired.
REFUSALS = (401, 403, 404, 410)
_OTHER_WAY = (
    ": if this goes on, a proxy may be in the way: fetch whole files, by --fetch download or into "
    "the cache by `kifmerge pull`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file in a repository, as the listing of a commit has it.

    Attributes:
        reference: of its folder, pinned.
        name: in the folder.
        size: in bytes.
        sha256: of its content; None of a file that is kept in git itself.
        git_oid: of its content, or where there is a sha256, of what stands for it in git.
    """

    reference: Reference
    name: str
    size: int
    sha256: str | None
    git_oid: str | None

    def __str__(self) -> str:
        return f"{self.reference}/{self.name}"


def file_address(file: HubFile, say: Say = silent) -> str:
    """Ask where the bytes of a file are: at an address that is signed and expires, or at the Hub's.

    Raises:
        CheckpointError: no such file, or no access.
        TryAgainError: network or server failed, or it is another file than the one listed.
    """
    url = huggingface_hub.hf_hub_url(
        file.reference.repo_id,
        file.reference.path(file.name),
        repo_type=file.reference.kind,
        revision=file.reference.revision,
        endpoint=constants.ENDPOINT,
    )

    found = patiently(
        lambda: hub_api().get_hf_file_metadata(url=url, timeout=constants.HF_HUB_ETAG_TIMEOUT),
        f"reading {file}",
        say,
    )
    _refuse_other(file, found.size, found.etag)
    return found.location


def _refuse_other(file: HubFile, size: int | None, etag: str | None) -> None:
    expected = file.sha256 or file.git_oid
    # Mirrors may have tags of their own kind.
    is_hash = expected is not None and etag is not None and len(etag) == len(expected)
    if size not in (None, file.size) or (is_hash and etag != expected):
        raise DamagedTransferError(
            f"reading {file}: the listing says {file.size} bytes ({expected}), the file's own "
            f"answer {size} ({etag}): a proxy may hold another version"
        )


class NoRangesError(PassingError):
    """The whole file comes where a range was asked for."""


class _RefusedAddressError(PassingError):
    """An address is not accepted, or not any more."""


class RangeReader:
    """Reads ranges of one file. Safe to read from in threads.

    Its address is asked for once, and again when it is no longer accepted.

    Args:
        file: what to read.
        say: told of long waits.
    """

    def __init__(self, file: HubFile, say: Say = silent) -> None:
        self.file = file
        self._say = say
        self._lock = threading.Lock()
        self._address: str | None = None

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes of a range, all of them.

        Raises:
            CheckpointError: the server does not serve ranges, or not of this file.
            TryAgainError: the network or the server failed too often in a row.
        """
        content = bytearray(stop - start)
        self.read_into(start, memoryview(content))
        return content

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on.

        Raises:
            CheckpointError: the server does not serve ranges, or not of this file.
            TryAgainError: the network or the server failed too often in a row.
        """
        patience = Patience(self._say)
        filled, was_refused = 0, False
        while filled < len(view):
            address, before = self._find_address(), filled
            try:
                with hub_errors(f"reading {self.file}"):
                    for chunk in self._chunks(address, start + filled, start + len(view)):
                        if len(chunk) > len(view) - filled:
                            raise PassingError(f"reading {self.file}: more bytes came than asked")
                        view[filled : filled + len(chunk)] = chunk
                        filled, was_refused = filled + len(chunk), False
                        if filled - before >= _LEAST_PROGRESS_BYTES:
                            patience.note_progress()
                if filled < len(view):
                    raise PassingError(f"reading {self.file}: the answer ended too soon")
            except _RefusedAddressError as error:
                self._forget(address)
                if was_refused:
                    patience.endure(error)
                was_refused = True  # the first time it has expired, as addresses do
            except PassingError as error:
                patience.endure(error)

    def _chunks(self, address: str, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        token = None if is_of_hub(address) else False
        headers = build_hf_headers(token=token, library_name=LIBRARY)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with huggingface_hub.get_session().stream(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            self._check(response, start, stop)
            # As they come: where the connection breaks, nothing that came is lost.
            yield from response.iter_raw()

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Refuse an answer that is not the range asked for."""
        what, status = f"reading {self.file}", response.status_code
        if status in REFUSALS:
            # The next attempt asks for a new address; where access itself is refused, it is
            # refused there.
            raise _RefusedAddressError(f"{what}: its address is not accepted (HTTP {status})")
        if is_passing(status):
            raise PassingError(f"{what}: HTTP {status}", asked_seconds(response.headers))
        if status not in (200, 206):
            raise CheckpointError(f"{what}: HTTP {status}")
        if response.headers.get("content-encoding") not in (None, "identity"):
            raise PassingError(f"{what}: the answer is compressed{_OTHER_WAY}")
        expected = f"bytes {start}-{stop - 1}/{self.file.size}"
        found = response.headers.get("content-range")
        if status == 206 and found != expected:
            raise PassingError(f"{what}: asked for {expected}, the answer is {found}{_OTHER_WAY}")
        # A proxy may leave out the range; what it sends then is the whole file.
        if status == 200 and (start, stop) != (0, self.file.size):
            raise NoRangesError(
                f"{what}: asked for a range, the answer is the whole file{_OTHER_WAY}"
            )

    def _find_address(self) -> str:
        with self._lock:
            if self._address is None:
                self._address = file_address(self.file, self._say)
            return self._address

    def _forget(self, address: str) -> None:
        with self._lock:
            if self._address == address:  # another thread may have found a new one
                self._address = None


def is_of_hub(address: str) -> bool:
    """Whether an address is of the Hub itself, which may see the token."""
    return _origin(address) == _origin(constants.ENDPOINT)


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port
