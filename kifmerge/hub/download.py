"""Files of a repository in the standard cache, checked against the repository's hashes."""

from __future__ import annotations

import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from kifmerge.errors import DamagedTransferError
from kifmerge.hub.client import LIBRARY, Say, patiently, silent
from kifmerge.hub.content import check_content
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.reference import Reference

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


def download(file: HubFile, say: Say = silent) -> Path:
    """Bring a file into the cache, unless it is there; an interrupted download goes on.

    Raises:
        CheckpointError: it cannot be had.
        TryAgainError: network or server failed, the disk is full, or what came is damaged.
    """
    with _locks_lock:
        lock = _locks.setdefault(str(file), threading.Lock())
    with lock:
        path = cached_path(file.reference, file.name)
        if path is not None:
            return path
        path = _fetch(file, say, anew=False)
        try:
            _check(path, file)
        except DamagedTransferError:
            say(f"{file}: damaged on the way, fetching it again")
            path = _fetch(file, say, anew=True)
            try:
                _check(path, file)
            except DamagedTransferError:
                # Left there, every program on this machine would take it for whole.
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise
        return path


def _fetch(file: HubFile, say: Say, *, anew: bool) -> Path:
    reference = file.reference

    def fetch() -> Path:
        found = huggingface_hub.hf_hub_download(
            reference.repo_id,
            reference.path(file.name),
            repo_type=reference.kind,
            revision=reference.revision,
            library_name=LIBRARY,
            endpoint=constants.ENDPOINT,
            force_download=anew,
        )
        return Path(found)

    return patiently(fetch, f"fetching {file}", say)


def _check(path: Path, file: HubFile) -> None:
    check_content(path, str(file), file.size, file.sha256, file.git_oid)
