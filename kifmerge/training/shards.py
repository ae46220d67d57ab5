"""What fusing live parameters needs that are sharded, or scored in another dtype or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.source import Source, peek
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.evidence import Evidence, ShowPiece
from kifmerge.fusion.selection import Marks, ScoreStream, warn_of_equal
from kifmerge.tensor.selection import Threshold, importance_threshold


class Float32Source:
    """Accumulators in float32 and beside their parameters, however and wherever they are kept.

    Args:
        source: ``KIND/NAME``.
        devices: NAME -> the parameter's.
    """

    def __init__(self, source: Source, devices: Mapping[str, torch.device]) -> None:
        self._source = source
        self._devices = devices

    def names(self) -> Sequence[str]:
        """As they are."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """As :meth:`read` gives them."""
        device = self._devices[name.partition("/")[2]]
        return TensorInfo(torch.float32, self._source.info(name).shape, device)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Some elements."""
        info = self.info(name)
        return self._source.read(name, start, stop).to(info.device, info.dtype)

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """The same, out of turn."""
        values = peek(self._source, name, start, stop)
        info = self.info(name)
        return None if values is None else values.to(info.device, info.dtype)

    def where(self, name: str) -> str:
        """As it is."""
        return self._source.where(name)

    def fingerprint(self) -> str:
        """Of what is kept."""
        return self._source.fingerprint()


def marks_of_shards(
    scores: Mapping[str, Source],
    names: Sequence[str],
    important_fraction: float,
    workers: Workers,
    holders: Ranks,
) -> Evidence:
    """Masks with one threshold per tensor, of tensors that processes hold parts of.

    Args:
        scores: role -> scores of what is held here.
        names: of the tensors that have elements anywhere.
        important_fraction: share to be found important in each.
        workers: share the passes.
        holders: the processes.
    """
    shows = []
    for role, source in scores.items():
        thresholds: dict[str, Threshold] = {}
        for name in names:
            own = holders.share([name], len)
            thresholds[name] = importance_threshold(
                ScoreStream(source, own, num_workers=workers.num),
                important_fraction,
                reduce_counts=holders.sum,
                spread=workers.map,
            )
        warn_of_equal(thresholds.values(), important_fraction, role)
        shows.append(_shown_by(Marks(source, thresholds, None)))
    return Evidence(shows=shows)


def _shown_by(marks: Marks) -> ShowPiece:
    return lambda piece, vector: marks.show(piece)
