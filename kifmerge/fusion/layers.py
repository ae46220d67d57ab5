"""The tensors of an artifact as its headers describe them, and their totals layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.source import FolderSource


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as its file's header describes it.

    Attributes:
        name: in the file.
        file: name of the file.
        shape: of the tensor.
        dtype: as torch calls it.
        num_bytes: in the file.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Totals of the tensors of one layer (of one file, for a trainer state).

    Attributes:
        name: see :func:`layer_of`.
        num_tensors: in it.
        num_parameters: elements; for snapshots and masks those that are scored or marked.
        num_bytes: in the files.
        mean_score: of a snapshot.
        num_important: of a snapshot or mask.
    """

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    mean_score: float | None = None
    num_important: int | None = None

    @property
    def important_fraction(self) -> float | None:
        """Share of the layer's parameters that are important; None where that is not known."""
        if self.num_important is None or not self.num_parameters:
            return None
        return self.num_important / self.num_parameters

    def as_dict(self) -> dict[str, Any]:
        """Its figures; those of importance only where they are known."""
        figures = {**asdict(self), "important_fraction": self.important_fraction}
        return {key: value for key, value in figures.items() if value is not None}


def tensor_entries(source: FolderSource) -> list[TensorEntry]:
    """All tensors of an artifact, in the order of its files."""
    entries = []
    for name in source.names():
        info, file = source.info(name), Path(source.where(name)).name
        dtype = str(info.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, file, info.shape, dtype, info.nbytes))
    return entries


def layer_totals(
    tensors: Sequence[TensorEntry], group: Callable[[TensorEntry], str]
) -> list[Layer]:
    """Totals of the tensors by the group that each belongs to."""
    grouped: dict[str, list[TensorEntry]] = {}
    for entry in tensors:
        grouped.setdefault(group(entry), []).append(entry)
    return [
        Layer(
            name,
            len(entries),
            sum(math.prod(entry.shape) for entry in entries),
            sum(entry.num_bytes for entry in entries),
        )
        for name, entries in grouped.items()
    ]


def layer_of(name: str) -> str:
    """The layer of a parameter: up to the first number in its dotted name, or else its module.

    >>> layer_of("model.layers.10.mlp.up_proj.weight")
    'model.layers.10'
    >>> layer_of("base_model.model.lm_head.lora_A.weight"), layer_of("scale")
    ('base_model.model.lm_head', 'scale')
    """
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: number + 1])
    module = parts[:-1]
    while module and module[-1].startswith("lora_"):
        module.pop()
    return ".".join(module) or name


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which layer 2 comes before layer 10.

    >>> sorted(["h.10.a", "h.2.a", "h"], key=natural_order)
    ['h', 'h.2.a', 'h.10.a']
    """
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]
