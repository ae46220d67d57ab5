"""Bytes of a file on the Hub by HTTP range: checked, and asked for again when something breaks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants

from kifmerge.errors import CheckpointError, DamagedTransferError
from kifmerge.hub.client import (
    MOST_TRIES,
    PassingError,
    Say,
    asked_seconds,
    hub_api,
    hub_errors,
    is_passing,
    patiently,
    pause,
    silent,
)
from kifmerge.hub.reference import Reference

_CHUNK_BYTES = 1 << 18


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


class RangeReader:
    """Reads ranges of one file. Safe to read from in threads.

    The address behind the repository's own, which is signed and expires, is asked for once, and
    again when it is no longer accepted.

    Args:
        file: what to read.
        say: told of long waits.
    """

    def __init__(self, file: HubFile, say: Say = silent) -> None:
        self.file = file
        self._say = say
        self._lock = threading.Lock()
        self._address: str | None = None
        self._url = huggingface_hub.hf_hub_url(
            file.reference.repo_id,
            file.reference.path(file.name),
            repo_type=file.reference.kind,
            revision=file.reference.revision,
            endpoint=constants.ENDPOINT,
        )

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes of a range, all of them.

        Raises:
            CheckpointError: the server does not serve ranges, or not of this file.
            TryAgainError: the network or the server failed too often in a row.
        """
        content = bytearray(stop - start)
        view = memoryview(content)
        filled, failures = 0, 0
        while filled < len(content):
            try:
                with hub_errors(f"reading {self.file}"):
                    for chunk in self._chunks(start + filled, stop):
                        if len(chunk) > len(content) - filled:
                            raise PassingError(f"reading {self.file}: more bytes came than asked")
                        view[filled : filled + len(chunk)] = chunk
                        filled, failures = filled + len(chunk), 0
                if filled < len(content):
                    raise PassingError(f"reading {self.file}: the answer ended too soon")
            except PassingError as error:
                failures += 1
                if failures >= MOST_TRIES:
                    raise
                pause(failures, error, self._say)
        return content

    def _chunks(self, start: int, stop: int) -> Any:
        address = self._find_address()
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if _origin(address) == _origin(constants.ENDPOINT):
            headers |= _authorization()
        with huggingface_hub.get_session().stream(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            self._check(response, start, stop)
            yield from response.iter_raw(_CHUNK_BYTES)

    def _check(self, response: Any, start: int, stop: int) -> None:
        """Refuse an answer that is not the range asked for."""
        what, status = f"reading {self.file}", response.status_code
        if status == 206:
            expected = f"bytes {start}-{stop - 1}/{self.file.size}"
            found = response.headers.get("content-range")
            if found != expected:
                raise PassingError(f"{what}: asked for {expected}, the answer is {found}")
        elif status == 200:
            # A proxy may leave out the range; what it sends then is the whole file.
            if (start, stop) != (0, self.file.size):
                raise PassingError(
                    f"{what}: asked for a range, the answer is the whole file: if this goes on, "
                    "take --fetch download"
                )
        elif status in (401, 403, 404, 410):
            # A signed address that has expired: the next attempt asks for a new one, and where
            # access itself is refused, it is refused there.
            self._forget_address()
            raise PassingError(f"{what}: the address is not accepted any more (HTTP {status})")
        elif is_passing(status):
            raise PassingError(f"{what}: HTTP {status}", asked_seconds(response.headers))
        else:
            raise CheckpointError(f"{what}: HTTP {status}")

    def _find_address(self) -> str:
        with self._lock:
            if self._address is None:
                found = patiently(
                    lambda: hub_api().get_hf_file_metadata(url=self._url),
                    f"reading {self.file}",
                    self._say,
                )
                self._refuse_other(found.size, found.etag)
                self._address = found.location
            return self._address

    def _refuse_other(self, size: int | None, etag: str | None) -> None:
        expected = self.file.sha256 or self.file.git_oid
        if size not in (None, self.file.size) or (expected and etag not in (None, expected)):
            raise DamagedTransferError(
                f"reading {self.file}: the listing says {self.file.size} bytes ({expected}), the "
                f"file's own answer {size} ({etag}): a proxy may hold another version"
            )

    def _forget_address(self) -> None:
        with self._lock:
            self._address = None


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port


def _authorization() -> dict[str, str]:
    token = huggingface_hub.get_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}
