"""What a folder of a repository holds at one commit: what the Hub lists, or what the cache has."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from kifmerge.errors import CheckpointError
from kifmerge.hub.background import in_own_thread
from kifmerge.hub.client import (
    PassingError,
    Say,
    hub_api,
    hub_errors,
    patiently,
    silent,
)
from kifmerge.hub.download import cached_path, hashes_of_cached
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.reference import Reference

WEIGHTS_SUFFIX = ".safetensors"
# A commit in the cache is found by any of these: every kind of folder has one of them.
_WITNESSES = (
    "config.json", "adapter_config.json", "importance.json", "mask.json", "units.json",
    "kifmerge.json", "README.md", ".gitattributes", "model.safetensors",
    "model.safetensors.index.json", "adapter_model.safetensors",
)  # fmt: skip
_CONFIGURATIONS = {"config.json", "adapter_config.json"}
_INDEX_SUFFIX = ".safetensors.index.json"
# Of more files the Hub's answer may leave some out.
_MOST_AT_ONCE = 50_000
_LISTING_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFolder:
    """What the cache holds of a folder.

    Attributes:
        reference: pinned to a commit.
        files: name -> file.
        is_whole: whether no weights are known to be missing.
    """

    reference: Reference
    files: Mapping[str, HubFile]
    is_whole: bool


def list_files(
    reference: Reference, say: Say = silent, *, is_cached: bool = False
) -> tuple[Reference, dict[str, HubFile]]:
    """Ask the Hub which commit a reference names at this moment, and which files its folder holds.

    Args:
        reference: of the folder.
        say: told of long waits.
        is_cached: it can be done without, where there is no network.

    Returns:
        The reference, pinned; name -> file.

    Raises:
        CheckpointError: no such repository, revision or folder, no access, or names of files that
            lead out of the folder.
        TryAgainError: network or server failed.
    """
    from kifmerge.hub.failures import transport_errors

    what = f"reading {reference}"

    def ask() -> Any:
        try:
            return hub_api().repo_info(
                reference.repo_id,
                repo_type=reference.kind,
                revision=reference.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except transport_errors() as error:
            if not is_cached:
                raise
            raise PassingError(f"{what}: no connection", is_final=True) from error

    info = patiently(ask, what, say)
    if info.sha is None:
        raise CheckpointError(f"{what}: the Hub does not say which commit it is at")
    pinned = reference.pinned(info.sha)
    entries = info.siblings or []
    is_known = all(entry.size is not None and entry.blob_id is not None for entry in entries)
    if not 0 < len(entries) < _MOST_AT_ONCE or not is_known:
        entries = _tree(pinned, what)
    files = dict(_files(pinned, entries))
    if reference.folder and not files:
        raise CheckpointError(f"{what}: no such folder in the repository")
    return pinned, files


def _tree(reference: Reference, what: str) -> list[Any]:
    """All files of a repository, however many, page by page."""

    def ask() -> list[Any]:
        entries = hub_api().list_repo_tree(
            reference.repo_id,
            recursive=True,
            revision=reference.revision,
            repo_type=reference.kind,
        )
        return [entry for entry in entries if hasattr(entry, "blob_id")]  # folders have none

    with hub_errors(what):  # the client has patience of its own here, and no timeout
        try:
            return in_own_thread(ask).result(_LISTING_SECONDS)
        except concurrent.futures.TimeoutError as error:
            raise PassingError(f"{what}: listing its files takes too long") from error


def _files(reference: Reference, entries: Iterable[Any]) -> Iterable[tuple[str, HubFile]]:
    start = f"{reference.folder}/" if reference.folder else ""
    for entry in entries:
        path = entry.path if hasattr(entry, "path") else entry.rfilename
        if {"", ".", ".."} & set(path.split("/")) or "\\" in path or "\0" in path:
            raise CheckpointError(f"{reference}: {path!r} is no path of a file in a repository")
        if path.startswith(start):
            name = path.removeprefix(start)
            sha256 = None if entry.lfs is None else entry.lfs.sha256
            yield (
                name,
                HubFile(
                    reference=reference,
                    name=name,
                    size=entry.size,
                    sha256=sha256,
                    git_oid=entry.blob_id,
                ),
            )


def find_cached(reference: Reference) -> CachedFolder | None:
    """What the cache holds of a folder, without a word to the network; None if nothing."""
    for witness in _WITNESSES:
        path = cached_path(reference, witness)
        if path is None:
            continue
        folder = path.parent
        commit = folder.parents[reference.folder.count("/")] if reference.folder else folder
        pinned = reference.pinned(commit.name)
        files = {
            found.relative_to(folder).as_posix(): found
            for found in sorted(folder.rglob("*"))
            if found.is_file()
        }
        return CachedFolder(
            reference=pinned,
            files={
                name: HubFile(
                    reference=pinned,
                    name=name,
                    size=found.stat().st_size,
                    **hashes_of_cached(found),
                )
                for name, found in files.items()
            },
            is_whole=_is_whole(files),
        )
    return None


def _is_whole(files: Mapping[str, Path]) -> bool:
    """Whether all shards of each index are there, and weights beside a configuration."""
    for name, path in files.items():
        if name.endswith(_INDEX_SUFFIX):
            try:
                shards = {*json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return False
            inside = name.rpartition("/")[0]
            if not {f"{inside}/{shard}" if inside else shard for shard in shards} <= files.keys():
                return False
    has_weights = any(name.endswith(WEIGHTS_SUFFIX) for name in files)
    return has_weights or not _CONFIGURATIONS & files.keys()
