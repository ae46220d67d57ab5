"""What changed between two folders of one kind, number by number, in constant memory.

Sums are taken in float64 in one order, so that figures depend on nothing but the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint import mask, snapshot
from kifmerge.checkpoint.folder import Folder, as_folder
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.pieces import Piece, pieces
from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.source import MODEL_STEM, FolderSource, open_source
from kifmerge.checkpoint.workers import Workers, worker_pool
from kifmerge.errors import CheckpointError
from kifmerge.fusion.fetching import Reading, settle
from kifmerge.fusion.layers import layer_of, natural_order
from kifmerge.phases.inspect import Kind, kind_of

OnProgress = Callable[[int], None]

_KINDS: Sequence[Kind] = ("checkpoint", "adapter", "importance snapshot", "mask")
# Measured: float64 scratch tensors of this size stay in cache, larger ones cost five times as much.
_BLOCK_NUMEL = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How far some tensors of the second folder are from those of the first.

    Elements that are NaN or infinite in either are counted, and left out of all other figures but
    the number of changed ones.

    Attributes:
        name: of the tensor, or of the layer.
        num_tensors: in it.
        num_values: elements.
        num_changed: elements that differ; NaN in both is no difference.
        max_change: largest absolute difference.
        mean_change: mean absolute difference.
        cosine: cosine similarity of both sides, -1 to 1; None where one is all zero.
        relative_change: norm of the difference by the norm of the first; None where only that is 0.
        num_nonfinite: elements that are NaN or infinite in the first, and in the second.
    """

    name: str
    num_tensors: int
    num_values: int
    num_changed: int
    max_change: float
    mean_change: float
    cosine: float | None
    relative_change: float | None
    num_nonfinite: tuple[int, int]

    @property
    def changed_fraction(self) -> float:
        """Share of the elements that differ; 0 where there are none."""
        return self.num_changed / self.num_values if self.num_values else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Its figures."""
        return {**asdict(self), "changed_fraction": self.changed_fraction}


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What was found between two folders.

    Attributes:
        kind: of both.
        first: folder.
        second: folder.
        total: of all tensors that are in both in one shape.
        layers: the same, layer by layer, in natural order.
        tensors: and tensor by tensor.
        only_first: names of tensors that only the first has.
        only_second: likewise.
        other_shape: name -> both sides of tensors that cannot be compared.
        other_dtype: name -> both sides of tensors that are compared as numbers.
    """

    kind: Kind
    first: str
    second: str
    total: Change
    layers: Sequence[Change]
    tensors: Sequence[Change]
    only_first: Sequence[str]
    only_second: Sequence[str]
    other_shape: Mapping[str, tuple[str, str]]
    other_dtype: Mapping[str, tuple[str, str]]

    @property
    def is_same(self) -> bool:
        """Whether both hold the same tensors, with the same values."""
        apart = (self.only_first, self.only_second, self.other_shape, self.other_dtype)
        return not self.total.num_changed and not any(apart)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "kind": self.kind,
            "first": self.first,
            "second": self.second,
            "is_same": self.is_same,
            "total": self.total.as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "other_shape": dict(self.other_shape),
            "other_dtype": dict(self.other_dtype),
        }


class FolderDiff:
    """Two folders of one kind that have been opened to be compared.

    Args:
        first: checkpoint, adapter, importance snapshot or mask.
        second: another of the same kind.
        num_workers: threads; None: one per processor.

    Raises:
        CheckpointError: folders that cannot be used, or that are not of one kind.
    """

    def __init__(
        self, first: Folder | str, second: Folder | str, *, num_workers: int | None = None
    ) -> None:
        self._references = (str(first), str(second))
        folders = as_folder(first), as_folder(second)
        self.kind = _common_kind(*folders)
        self._sources = [_open(folder, self.kind) for folder in folders]
        self._num_workers = num_workers
        self._infos = [{name: s.info(name) for name in s.names()} for s in self._sources]
        ours, theirs = self._infos
        self._names = [
            n for n, info in ours.items() if n in theirs and info.shape == theirs[n].shape
        ]
        stored = [s.stored if isinstance(s, mask.MaskSource) else s for s in self._sources]
        settle([Reading(source=s, names=self._names) for s in stored])

    @property
    def num_values(self) -> int:
        """Elements to be compared."""
        return sum(self._infos[0][name].numel for name in self._names)

    def run(self, *, on_progress: OnProgress = lambda num_compared: None) -> Diff:
        """Compare all tensors; both folders are read once.

        Args:
            on_progress: told the number of elements compared after each piece.
        """
        sums = {name: _Sums(num_tensors=1) for name in self._names}
        with worker_pool(self._num_workers) as workers:
            self._compare(sums, workers, on_progress)
        layers: dict[str, _Sums] = {}
        total = _Sums()
        for name, part in sums.items():
            layers.setdefault(self._layer_of(name), _Sums()).add(part)
            total.add(part)
        ours, theirs = self._infos
        first, second = self._references
        return Diff(
            kind=self.kind,
            first=first,
            second=second,
            total=total.change("total"),
            layers=_changes(layers),
            tensors=_changes(sums),
            only_first=sorted(ours.keys() - theirs.keys(), key=natural_order),
            only_second=sorted(theirs.keys() - ours.keys(), key=natural_order),
            other_shape=self._differing(lambda info: info.shape),
            other_dtype=self._differing(lambda info: info.dtype, among=self._names),
        )

    def _compare(
        self, sums: Mapping[str, _Sums], workers: Workers, on_progress: OnProgress
    ) -> None:
        first, second = self._sources

        def compare(piece: Piece) -> list[tuple[str, _Sums]]:
            return [(r.name, _compared(first.read(*r), second.read(*r))) for r in piece]

        for found in workers.map(compare, pieces(first, self._names)):
            for name, part in found:
                sums[name].add(part)
            on_progress(sum(part.num_values for _, part in found))

    def _layer_of(self, name: str) -> str:
        if self.kind != "importance snapshot":
            return layer_of(name)
        what, _, parameter = name.partition("/")
        return f"{what}/{layer_of(parameter)}"

    def _differing(
        self, read: Callable[[TensorInfo], object], among: Iterable[str] | None = None
    ) -> dict[str, tuple[str, str]]:
        ours, theirs = self._infos
        names = ours.keys() & theirs.keys() if among is None else among
        return {
            name: (str(ours[name]), str(theirs[name]))
            for name in sorted(names, key=natural_order)
            if read(ours[name]) != read(theirs[name])
        }


@dataclass(slots=True)
class _Sums:
    """What figures are made of, added up."""

    num_tensors: int = 0
    num_values: int = 0
    num_finite: int = 0
    num_changed: int = 0
    nonfinite_first: int = 0
    nonfinite_second: int = 0
    sum_change: float = 0.0
    squares_first: float = 0.0
    squares_second: float = 0.0
    squares_change: float = 0.0
    product: float = 0.0
    max_change: float = 0.0

    def add(self, other: _Sums) -> None:
        """Take in another part."""
        largest = max(self.max_change, other.max_change)
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.max_change = largest

    def change(self, name: str) -> Change:
        """The figures."""
        norm_first, norm_second = math.sqrt(self.squares_first), math.sqrt(self.squares_second)
        norm_change = math.sqrt(self.squares_change)
        cosine: float | None = None
        if norm_first and norm_second and math.isfinite(self.product):
            # Sums round: neither what is equal nor what is nearly so should come out beside 1.
            cosine = self.product / norm_first / norm_second if self.num_changed else 1.0
            cosine = max(-1.0, min(1.0, cosine))
        relative = norm_change / norm_first if norm_first else None
        return Change(
            name=name,
            num_tensors=self.num_tensors,
            num_values=self.num_values,
            num_changed=self.num_changed,
            max_change=self.max_change,
            mean_change=self.sum_change / self.num_finite if self.num_finite else 0.0,
            cosine=cosine,
            relative_change=0.0 if not norm_change else relative,
            num_nonfinite=(self.nonfinite_first, self.nonfinite_second),
        )


def _compared(first: Tensor, second: Tensor) -> _Sums:
    """Sums over the elements of two flat tensors of one length."""
    sums = _Sums()
    for a, b in zip(first.split(_BLOCK_NUMEL), second.split(_BLOCK_NUMEL), strict=True):
        sums.add(_block_sums(a, b))
    return sums


def _block_sums(a: Tensor, b: Tensor) -> _Sums:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    num_changed = int(torch.count_nonzero(x != y))
    sums = _Sums(num_values=a.numel(), num_finite=a.numel())
    if not a.is_floating_point() and a.dtype == b.dtype:
        num_changed = int(torch.count_nonzero(a != b))  # float64 rounds large whole numbers
    if not math.isfinite(_square(x)) or not math.isfinite(_square(y)):
        x_finite, y_finite = x.isfinite(), y.isfinite()
        sums.nonfinite_first = int(torch.count_nonzero(~x_finite))
        sums.nonfinite_second = int(torch.count_nonzero(~y_finite))
        num_changed -= int(torch.count_nonzero(x.isnan() & y.isnan()))
        x, y = x[x_finite & y_finite], y[x_finite & y_finite]
        sums.num_finite = x.numel()
    sums.num_changed = num_changed
    sums.squares_first, sums.squares_second = _square(x), _square(y)
    if not num_changed:
        sums.product = sums.squares_first
        return sums
    change = y - x
    sums.product = float(torch.vdot(x, y).real)
    sums.squares_change = _square(change)
    sizes = change.abs()
    if sizes.numel():
        sums.sum_change, sums.max_change = float(sizes.sum()), float(sizes.max())
    return sums


def _square(values: Tensor) -> float:
    """The square of the norm; not finite where an element is not."""
    return float(torch.vdot(values, values).real)


def _changes(sums: Mapping[str, _Sums]) -> list[Change]:
    return [sums[name].change(name) for name in sorted(sums, key=natural_order)]


def _common_kind(first: Folder, second: Folder) -> Kind:
    kinds = kind_of(first), kind_of(second)
    for reference, kind in zip((first, second), kinds, strict=True):
        if kind not in _KINDS:
            raise CheckpointError(
                f"{reference} is {_with_article(kind)}: "
                f"expected one of {', '.join(_KINDS)} to compare"
            )
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{first} is {_with_article(kinds[0])}, {second} {_with_article(kinds[1])}: "
            "only two of one kind compare"
        )
    return kinds[0]


def _with_article(kind: Kind) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _open(directory: Folder, kind: Kind) -> mask.MaskSource | FolderSource:
    if kind == "mask":
        return mask.MaskSource(directory)
    if kind == "importance snapshot":
        open_scores(directory)  # for its checks
        return FolderSource(directory, snapshot.STEM)
    if read_details(directory / "config.json").get("quantization_config"):
        return FolderSource(directory, MODEL_STEM)  # not to be merged, but to be looked at
    return open_source(directory)
