"""Files of a repository in the standard cache, checked against the repository's hashes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from kifmerge.errors import CheckpointError, DamagedTransferError, KifmergeError
from kifmerge.hub.client import (
    LIBRARY,
    PassingError,
    Patience,
    Say,
    hub_api,
    hub_errors,
    silent,
    status_of,
)
from kifmerge.hub.content import check_content
from kifmerge.hub.ranges import REFUSALS, HubFile, file_address, is_of_hub
from kifmerge.hub.reference import Reference

_SHA256 = re.compile(r"[0-9a-f]{64}")
# What the client makes of a name for a process of its own; others could be gone on with.
_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.incomplete$")
_GIT_OID = re.compile(r"[0-9a-f]{40}")

_calling = threading.local()
_locks: dict[str, threading.Lock] = {}
_locks_lock = threading.Lock()


def cached_path(reference: Reference, name: str) -> Path | None:
    """Where the cache holds a file; None if it does not."""
    found = huggingface_hub.try_to_load_from_cache(
        reference.repo_id,
        reference.path(name),
        revision=reference.revision,
        repo_type=reference.kind,
    )
    return Path(found) if isinstance(found, str) else None


def cached_file(file: HubFile) -> Path | None:
    """Where the cache holds a file of the right size; None if it does not."""
    path = cached_path(file.reference, file.name)
    return path if path is not None and path.stat().st_size == file.size else None


def hashes_of_cached(path: Path) -> dict[str, str | None]:
    """The ``sha256`` or ``git_oid`` that a file had when it came: the cache names it after that."""
    name = path.resolve().name
    return {
        "sha256": name if _SHA256.fullmatch(name) else None,
        "git_oid": name if _GIT_OID.fullmatch(name) else None,
    }


def download(file: HubFile, say: Say = silent) -> Path:
    """Bring a file into the cache, unless it is there.

    Raises:
        CheckpointError: it cannot be had.
        TryAgainError: network or server failed, the disk is full, or what came is damaged.
    """
    with _locked(file):
        return cached_file(file) or _fetched(file, say)


def download_checked(file: HubFile, say: Say = silent) -> Path:
    """Bring a file into the cache; what is there already is checked too, and fetched if need be.

    Raises:
        CheckpointError: it cannot be had.
        TryAgainError: network or server failed, the disk is full, or what came is damaged.
    """
    with _locked(file):
        path = cached_file(file)
        if path is not None:
            try:
                _check(path, file)
            except DamagedTransferError:
                say(f"{file}: damaged in the cache, fetching it again")
            else:
                return path
        return _fetched(file, say)


def note_revision(asked: Reference, pinned: Reference, name: str) -> None:
    """Let the cache know which commit a branch or tag is at, so that offline its name is enough.

    Nothing is done if it has moved on meanwhile, or the Hub cannot be asked.

    Args:
        asked: reference that was opened.
        pinned: what it was then.
        name: of a file of the folder that the cache holds.
    """
    if asked.is_pinned or cached_path(asked, name) == cached_path(pinned, name):
        return
    with contextlib.suppress(KifmergeError), hub_errors(f"looking up {asked}"):
        info = hub_api().repo_info(
            asked.repo_id,
            repo_type=asked.kind,
            revision=asked.revision,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if info.sha == pinned.revision:
            # The file is there: only the name of the revision is noted.
            _call_client(asked, name, anew=False)


def _fetched(file: HubFile, say: Say) -> Path:
    """Fetch a file, and once more if it comes damaged."""
    # What the cache holds is not what it should be, or it would not be fetched.
    anew = cached_path(file.reference, file.name) is not None
    for is_last in (False, True):
        path = _fetch(file, say, anew=anew)
        try:
            _check(path, file)
        except DamagedTransferError:
            if is_last:
                # Left there, every program on this machine would take it for whole.
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise
            say(f"{file}: damaged on the way, fetching it again")
            anew = True
        else:
            break
    return path


def _fetch(file: HubFile, say: Say, *, anew: bool) -> Path:
    patience = Patience(say)
    while True:
        # Asked first by ourselves: the client has minutes of patience with a server that is gone.
        file_address(file, say)
        try:
            with hub_errors(f"fetching {file}"):
                return _call_client(file.reference, file.name, anew=anew)
        except PassingError as error:
            patience.endure(error)


@atexit.register
def _remove_unfinished() -> None:
    """Where the process ends without the thread that fetches, the client cannot do it."""
    with contextlib.suppress(OSError):  # not on every system
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                path = link.readlink()
                if _UNFINISHED.search(path.name) and path.is_relative_to(_cache()):
                    path.unlink()


def _cache() -> Path:
    return Path(constants.HF_HUB_CACHE).resolve()


def _call_client(reference: Reference, name: str, *, anew: bool) -> Path:
    from huggingface_hub.errors import HfHubHTTPError

    from kifmerge.hub.failures import timeout_errors

    what = f"fetching {reference}/{name}"
    try:
        with _without_warnings():
            found = huggingface_hub.hf_hub_download(
                reference.repo_id,
                reference.path(name),
                repo_type=reference.kind,
                revision=reference.revision,
                library_name=LIBRARY,
                endpoint=constants.ENDPOINT,
                force_download=anew,
            )
    except timeout_errors() as error:
        # The client has waited, and tried again, for a minute.
        raise PassingError(f"{what}: the connection stands still", is_final=True) from error
    except HfHubHTTPError as error:
        status = status_of(error)
        if status not in REFUSALS or is_of_hub(str(error.response.url)):
            raise
        raise PassingError(f"{what}: its address is not accepted (HTTP {status})") from error
    except RuntimeError as error:  # of hf-xet
        raise PassingError(f"{what}: the transfer failed") from error
    except ValueError as error:
        if error.__cause__ is not None:
            raise
        raise CheckpointError(f"{what}: {error}") from error  # too large for plain HTTP
    return Path(found)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The client's warnings tell signed addresses; what goes wrong is told by us."""
    _watch_warnings()
    _calling.is_ours = True
    try:
        yield
    finally:
        _calling.is_ours = False


@functools.cache
def _watch_warnings() -> None:
    for module in ("file_download", "utils._http"):
        logging.getLogger(f"huggingface_hub.{module}").addFilter(_is_told)


def _is_told(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not getattr(_calling, "is_ours", False)


def _check(path: Path, file: HubFile) -> None:
    check_content(path, str(file), file.size, file.sha256, file.git_oid)


@contextlib.contextmanager
def _locked(file: HubFile) -> Iterator[None]:
    with _locks_lock:
        lock = _locks.setdefault(str(file), threading.Lock())
    with lock:
        yield
