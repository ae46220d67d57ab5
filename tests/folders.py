"""Checkpoints and snapshots on disk, made of given or random tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.provenance import write_provenance
from kifmerge.checkpoint.snapshot import write_snapshot

SHAPES = {"b.weight": (5, 7), "a.weight": (3, 4), "a.bias": (4,), "c.empty": (0, 2), "d": ()}


def random_tensors(
    seed: int,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(tuple(s), generator=generator).to(dtype) for n, s in shapes.items()}


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    num_shards: int = 0,
    stem: str = "model",
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; with shards the tensors are dealt out to them in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    config_name = "adapter_config.json" if stem == "adapter_model" else "config.json"
    (directory / config_name).write_text(json.dumps(config or {"model_type": "none"}))
    metadata = {"format": "pt"}
    if num_shards == 0:
        safetensors.torch.save_file(dict(tensors), directory / f"{stem}.safetensors", metadata)
    else:
        weight_map = {}
        for number in range(num_shards):
            file = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            part = dict(list(tensors.items())[number::num_shards])
            safetensors.torch.save_file(part, directory / file, metadata)
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if provenance is not None:
        write_provenance(directory, provenance)
    return directory


def state(path: Path) -> tuple[int, ...]:
    """What changes when a file or folder is written, though not when it is read."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by another tool than ours."""
    loaded = {}
    for path in directory.glob("*.safetensors"):
        loaded.update(safetensors.torch.load_file(path))
    return loaded


def snapshot(
    directory: Path,
    seed: int,
    tensors: Mapping[str, Tensor],
    *,
    num_shards: int = 1,
    **details: Any,
) -> Path:
    """Random sensitivity and uncertainty of some tensors, dealt out to shards in turn."""
    generator = torch.Generator().manual_seed(1000 + seed)
    kept = {
        f"{kind}/{name}": torch.rand(value.shape, generator=generator)
        for kind in ("sensitivity", "uncertainty")
        for name, value in tensors.items()
    }
    shards = [list(kept)[number::num_shards] for number in range(num_shards)]
    write_snapshot(directory, kept, details, shards=shards)
    return directory


def made_by(command: str, **parents: Path) -> dict[str, Any]:
    """A record as commands leave it, of parents by role."""
    described = {r: {"reference": str(p), "digest": digest(p)} for r, p in parents.items()}
    return {"made_by": {"command": command, "options": {}, "parents": described}}


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, as hostile as one likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
