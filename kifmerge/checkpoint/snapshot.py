"""Importance snapshots on disk: what was identified, in files any safetensors tool can read.

importance.safetensors   ``sensitivity/NAME`` and ``uncertainty/NAME``, or ``score/NAME`` alone,
                         float32 or bfloat16, NAME as in the checkpoint's own files; or shards
                         ``importance-00001-of-00002.safetensors`` with their index
importance.json          format and version, and what is known of model, task, role, steps,
                         options and sample count
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint.atomic import whole_file, write_json
from kifmerge.checkpoint.folder import Folder, as_folder
from kifmerge.checkpoint.gathering import Part, write_parts, write_tensor
from kifmerge.checkpoint.header import TensorInfo, header_of
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.source import FolderSource, index_name, read_whole
from kifmerge.errors import CheckpointError
from kifmerge.tensor.importance import Score, score

FORMAT = "kifmerge.importance"
VERSION = 1
STEM = "importance"
TENSOR_FILE = f"{STEM}.safetensors"
DETAIL_FILE = f"{STEM}.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An importance snapshot in a folder; tensors are read when asked for, one at a time.

    Attributes:
        directory: the folder.
        details: content of ``importance.json``.
        names: parameter names, sorted.
        source: of the tensors as they are kept.
    """

    directory: Folder
    details: Mapping[str, Any]
    names: tuple[str, ...]
    source: FolderSource

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as they are kept, at once: for what fits in memory."""
        return {key: self._tensor(key) for key in self.source.names()}

    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, score), by the score kind that the snapshot's options recorded."""
        options = self.details.get("options") or {}
        kind: Score = options.get("score", "product")
        kept = set(self.source.names())
        for name in self.names:
            if f"score/{name}" in kept:
                yield name, self._tensor(f"score/{name}")
            else:
                sensitivity = self._tensor(f"sensitivity/{name}")
                yield name, score(sensitivity, self._tensor(f"uncertainty/{name}"), kind)

    def _tensor(self, key: str) -> Tensor:
        return read_whole(self.source, key)


def write_snapshot(
    directory: Path,
    tensors: Mapping[str, Tensor],
    details: Mapping[str, Any],
    *,
    shards: Sequence[Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a snapshot; the JSON comes last, so that a folder without it is no snapshot.

    Args:
        directory: made if need be.
        tensors: ``sensitivity/NAME`` and ``uncertainty/NAME`` (or ``score/NAME``), on any device.
            Asked for twice each, shard by shard and in order, and kept no longer than it takes.
        details: what is known: role, steps, options, task...
        shards: the keys of each file; None: one file.
        dtype: to write in; None: each tensor's own.
    """
    (directory / DETAIL_FILE).unlink(missing_ok=True)
    shards = [list(tensors)] if shards is None else shards
    num_shards = len(shards)
    files = {
        f"{STEM}-{number:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else TENSOR_FILE: k
        for number, k in enumerate(shards, start=1)
    }
    num_bytes = sum(
        _write_file(directory / file, tensors, keys, dtype) for file, keys in files.items()
    )
    for left in (*directory.glob(f"{STEM}-*-of-*.safetensors"), directory / TENSOR_FILE):
        if left.name not in files:
            left.unlink(missing_ok=True)
    (directory / index_name(STEM)).unlink(missing_ok=True)
    if num_shards > 1:
        weight_map = {key: file for file, keys in files.items() for key in keys}
        content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_json(directory / index_name(STEM), content)
    _write_details(directory, details)


def write_gathered_snapshot(
    directory: Path, parts: Sequence[Part], details: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write a snapshot of tensors that processes hold parts of; all of them call it together.

    Args:
        directory: that all processes see; made if need be.
        parts: with the keys of :func:`write_snapshot`.
        details: what is known.
        ranks: the processes; each writes a file of its own where that is worth it.

    Raises:
        CheckpointError: a process could not write.
    """
    if ranks.is_first:
        (directory / DETAIL_FILE).unlink(missing_ok=True)
    ranks.meet()
    write_parts(directory, STEM, parts, ranks)
    if ranks.is_first:
        _write_details(directory, details)
    ranks.meet()


def _write_details(directory: Path, details: Mapping[str, Any]) -> None:
    header = {"format": FORMAT, "version": VERSION}
    write_json(directory / DETAIL_FILE, {**header, **details, **header})


def _write_file(
    path: Path, tensors: Mapping[str, Tensor], keys: Sequence[str], dtype: torch.dtype | None
) -> int:
    """Write some tensors as one file, a piece at a time; the number of their bytes."""
    infos = [(key, _info(tensors[key], dtype)) for key in keys]
    first, _ = header_of(infos)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(first)
        for key, kept_as in infos:
            write_tensor(file, tensors[key], kept_as)
    return sum(kept_as.nbytes for _, kept_as in infos)


def _info(tensor: Tensor, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(dtype or tensor.dtype, tuple(tensor.shape))


def read_snapshot(directory: Folder | str) -> Snapshot:
    """Open a snapshot, reading its JSON and its headers only.

    Raises:
        CheckpointError: no snapshot there, one of a newer version, or a damaged file.
    """
    directory = as_folder(directory)
    detail_path = directory / DETAIL_FILE
    details = read_details(detail_path)
    if not details:
        raise CheckpointError(f"{directory} holds no importance snapshot: no {DETAIL_FILE}")
    check_format(details, FORMAT, VERSION, detail_path)
    source = FolderSource(directory, STEM)
    names = sorted({key.partition("/")[2] for key in source.names()})
    return Snapshot(directory, details, tuple(names), source)
