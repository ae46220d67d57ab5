"""Where models, adapters and tokenizers are loaded from: pinned to a commit, and brought here.

A name is a path, a reference to the Hub, or a bare name such as ``gpt2``, which is left to
transformers. Libraries are given folders of the cache into which every file came checked, so that
they pull nothing themselves, and no code and no pickle comes at all.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

from kifmerge.checkpoint.folder import Folder, Folders, has_file
from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.source import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    MODEL_STEM,
    FolderSource,
    index_name,
    open_source,
)
from kifmerge.errors import CheckpointError
from kifmerge.hub.client import Say, is_offline, silent
from kifmerge.hub.download import cached_file
from kifmerge.hub.folder import HubFolder
from kifmerge.hub.reference import Reference, parse_reference

# Configurations, vocabularies in any of their forms, and chat templates.
_SMALL = (
    "*.json", "*.txt", "*.jinja", "*.model", "*.model.*", "*.spm", "*.bpe", "*.codes", "*.tiktoken",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates/*.jinja"

# Commits never change: each is listed once, however often something of it is loaded.
_opened: dict[Reference, HubFolder] = {}


def on_hub(name: str | Path | None) -> Reference | None:
    """The reference that a name is; None of a path and of a bare name."""
    found = None if name is None else parse_reference(name)
    return found if isinstance(found, Reference) else None


def pinned(name: str, say: Say = silent) -> str:
    """A reference at the commit that it names now; what is on this disk as it is.

    Raises:
        CheckpointError: no such repository, revision or folder, or no access.
        TryAgainError: network or server failed.
    """
    reference = on_hub(name)
    if reference is None:
        return name
    return str(reference) if reference.is_pinned else str(opened(name, say))


def opened(name: str | Path, say: Say = silent) -> Folder:
    """The folder that a name stands for; a path need not exist.

    Raises:
        CheckpointError: no such repository, revision or folder, or no access.
        TryAgainError: network or server failed.
    """
    reference = parse_reference(name)
    if isinstance(reference, Path):
        return reference
    if reference not in _opened:
        folder = Folders("download", say).open(name)
        assert isinstance(folder, HubFolder)
        reference = folder.reference
        _opened[reference] = folder
    if say is not silent:
        _opened[reference].say = say
    return _opened[reference]


def local_copy(reference: str | Path, *, with_weights: bool = True, say: Say = silent) -> str:
    """The folder that a library can load from: of a reference to the Hub, the cache's.

    Args:
        reference: of a model, an adapter or a tokenizer; a path or a bare name stays as it is.
        with_weights: bring weights too, and find them whole.
        say: told what is fetched.

    Raises:
        CheckpointError: it cannot be had, or holds pickles only, no weights, or damaged ones.
        TryAgainError: network or server failed, the disk is full, or what came is damaged.
    """
    folder = opened(reference, say)
    if isinstance(folder, Path):
        return str(reference)
    small = [n for n in folder.files if _is_small(n)]
    shards = _weight_files(folder) if with_weights else []
    missing = {n for n in (*small, *shards) if cached_file(folder.files[n]) is None}
    if missing:
        say(f"fetching {folder}: {sum(folder.files[n].size for n in missing):,} bytes")
    paths = {}
    for name in (*small, *shards):
        if len(shards) > 1 and name in missing.intersection(shards):
            say(f"fetching {name}, {shards.index(name) + 1} of {len(shards)}")
        paths[name] = folder / name
    if with_weights:
        FolderSource(folder, _stem(folder))  # index and headers agree, or it says how they do not
    inside = next((path for name, path in paths.items() if "/" not in name), None)
    if inside is None:
        raise CheckpointError(_nothing_there(f"{folder} holds no model, adapter or tokenizer"))
    return str(inside.parent)


def _is_small(name: str) -> bool:
    patterns = (_TEMPLATES,) if "/" in name else _SMALL
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _stem(folder: HubFolder) -> str:
    return ADAPTER_STEM if has_file(folder, ADAPTER_CONFIG) else MODEL_STEM


def _weight_files(folder: HubFolder) -> list[str]:
    """Names of a folder's weights; none where the index cannot be followed."""
    stem = _stem(folder)
    if has_file(folder, f"{stem}.safetensors"):
        return [f"{stem}.safetensors"]
    if not has_file(folder, index_name(stem)):
        try:
            open_source(folder)  # says what is there instead
        except CheckpointError as error:
            raise CheckpointError(_nothing_there(str(error))) from error
    weight_map = read_details(folder / index_name(stem)).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    is_whole = all(isinstance(shard, str) and has_file(folder, shard) for shard in shards)
    return sorted(set(shards)) if is_whole else []


def _nothing_there(problem: str) -> str:
    cache = ". HF_HUB_OFFLINE is set: there may be more of it on the Hub than in the cache"
    return problem + (cache if is_offline() else "")
