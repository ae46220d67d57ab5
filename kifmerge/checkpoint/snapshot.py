"""Importance snapshots on disk: what was identified, in files any safetensors tool can read.

importance.safetensors   ``sensitivity/NAME`` and ``uncertainty/NAME``, or ``score/NAME`` alone,
                         float32 or bfloat16, NAME as in the checkpoint's own files
importance.json          format and version, and what is known of model, task, role, steps,
                         options and sample count
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from kifmerge.checkpoint.atomic import whole_file, write_json
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.errors import CheckpointError
from kifmerge.tensor.importance import Score, score

FORMAT = "kifmerge.importance"
VERSION = 1
TENSOR_FILE = "importance.safetensors"
DETAIL_FILE = "importance.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An importance snapshot in a folder; tensors are read when asked for, one at a time.

    Attributes:
        directory: the folder.
        details: content of ``importance.json``.
        names: parameter names, sorted.
    """

    directory: Path
    details: Mapping[str, Any]
    names: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as they are kept, at once: for what fits in memory."""
        return safetensors.torch.load_file(self.directory / TENSOR_FILE)

    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, score), by the score kind that the snapshot's options recorded."""
        options = self.details.get("options") or {}
        kind: Score = options.get("score", "product")
        with safetensors.safe_open(self.directory / TENSOR_FILE, framework="pt") as file:
            kept = set(file.keys())
            for name in self.names:
                if f"score/{name}" in kept:
                    yield name, file.get_tensor(f"score/{name}")
                else:
                    sensitivity = file.get_tensor(f"sensitivity/{name}")
                    yield name, score(sensitivity, file.get_tensor(f"uncertainty/{name}"), kind)


def write_snapshot(
    directory: Path, tensors: Mapping[str, Tensor], details: Mapping[str, Any]
) -> None:
    """Write a snapshot; the JSON comes last, so that a folder without it is no snapshot.

    Args:
        directory: made if need be.
        tensors: ``sensitivity/NAME`` and ``uncertainty/NAME`` (or ``score/NAME``).
        details: what is known: role, steps, options, task...
    """
    (directory / DETAIL_FILE).unlink(missing_ok=True)
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    with whole_file(directory / TENSOR_FILE) as temporary:
        safetensors.torch.save_file(contiguous, temporary, metadata={"format": "pt"})
    header = {"format": FORMAT, "version": VERSION}
    write_json(directory / DETAIL_FILE, {**header, **details, **header})


def read_snapshot(directory: Path | str) -> Snapshot:
    """Open a snapshot, reading its JSON and its header only.

    Raises:
        CheckpointError: no snapshot there, one of a newer version, or a damaged file.
    """
    directory = Path(directory)
    detail_path = directory / DETAIL_FILE
    details = read_details(detail_path)
    if not details:
        raise CheckpointError(f"{directory} holds no importance snapshot: no {DETAIL_FILE}")
    check_format(details, FORMAT, VERSION, detail_path)
    try:
        with safetensors.safe_open(directory / TENSOR_FILE, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{directory / TENSOR_FILE}: cannot be read ({error})") from error
    names = sorted({key.partition("/")[2] for key in keys})
    return Snapshot(directory, details, tuple(names))
