"""The plan of a pruning: passes, bytes and memory, known from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kifmerge.checkpoint.pieces import CPU_PIECE_BYTES
from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.source import FolderSource, Source
from kifmerge.checkpoint.workers import num_processors, peak_bytes
from kifmerge.fusion.agreement import Checkpoint
from kifmerge.fusion.estimate import PRUNE_NS, SCORE_NS, WRITE_NS, Load, network_load
from kifmerge.fusion.fetching import Reading, Settled
from kifmerge.fusion.selection import counting_bytes
from kifmerge.tensor.selection import Scope

# What one worker takes for a piece: both models', scores or mask, and what comes of them.
_PRUNED_BYTES = 6 * CPU_PIECE_BYTES
# Of scores in float32 that may stay in memory.
_KEPT_BYTES = 1 << 25
# Libraries, threads, and what the allocator keeps between pieces.
_SPARE_BYTES = 24 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What a pruning is going to do.

    Attributes:
        num_tensors: of the mask.
        num_parameters: that the mask speaks of.
        importance_passes: how often the scores are read.
        weight_passes: how often base and model are read.
        read_bytes: in all, where no tensors without scores differ.
        write_bytes: of the mask, and of the pruned checkpoint's weights.
        pulled_bytes: of weights and scores that come over the network.
        disk_bytes: room that the output and what is downloaded take.
        fetch: how each input on the Hub is read, and why.
        peak_memory_bytes: about what the process will need: Python and torch, and the buffers of
            all workers together.
    """

    num_tensors: int
    num_parameters: int
    importance_passes: int
    weight_passes: int
    read_bytes: int
    write_bytes: int
    pulled_bytes: int
    disk_bytes: int
    fetch: tuple[str, ...]
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneNeeds:
    """What a pruning needs of disk, network and memory.

    Attributes:
        evidence: scores, or what units say of each parameter.
        scores: of an importance snapshot; None: there are units.
        base: what is not important goes back to; None: only the mask is made.
        model: that is pruned; given with ``base``.
        copied: whose tensors without scores are taken; given with ``base``.
        scope: of the threshold.
        num_workers: threads; 0: the caller's own.
    """

    evidence: Source
    scores: Scores | None
    base: Checkpoint | None
    model: Checkpoint | None
    copied: Checkpoint | None
    scope: Scope
    num_workers: int

    @property
    def keeps_scores(self) -> bool:
        """Whether scores are so few that they stay in memory."""
        return self.scores is not None and self._num_parameters * 4 <= _KEPT_BYTES

    @property
    def importance_passes(self) -> int:
        """How often scores are read, unless very many of them are nearly the threshold.

        A threshold for each tensor takes two passes, one to mark, and one to prune.
        """
        if self.scores is None:
            return 0
        if self.keeps_scores:
            return 1
        return 2 if self.scope == "global" else 3 + (self.base is not None)

    @property
    def provisional_bytes(self) -> int:
        """What marks take on the disk while their threshold is being found: at most, about."""
        is_provisional = self.importance_passes == 2
        return self._num_parameters // 2 if is_provisional else 0

    @property
    def _num_parameters(self) -> int:
        return sum(self.evidence.info(name).numel for name in self.evidence.names())

    @property
    def write_bytes(self) -> int:
        """Of the mask, and of the pruned checkpoint's weights."""
        infos = [self.evidence.info(name) for name in self.evidence.names()]
        return sum(-(-info.numel // 8) for info in infos) + _num_bytes(self.base)

    def judged(self) -> list[str]:
        """Names of the base's tensors that the mask speaks of, in the order of its files."""
        if self.base is None:
            return []
        scored = frozenset(self.evidence.names())
        return [name for name in self.base.source.names() if name in scored]

    def readings(self) -> list[Reading]:
        """What is going to be read, in the order of the base's files."""
        found = []
        if self.scores is not None and isinstance(self.scores.stored, FolderSource):
            stored, passes = self.scores.stored, self.importance_passes
            found.append(Reading(source=stored, names=stored.names(), num_passes=passes))
        if self.base is not None and self.model is not None and self.copied is not None:
            names, judged = self.base.source.names(), frozenset(self.judged())
            unjudged = [name for name in names if name not in judged]
            found += [
                Reading(source=self.base.source, names=names),
                Reading(source=self.model.source, names=names),
                Reading(source=self.copied.source, names=unjudged),
            ]
        return [reading for reading in found if reading.names]

    def plan(self, settled: Sequence[Settled]) -> PrunePlan:
        """All of it.

        Args:
            settled: how the inputs on the Hub are read.
        """
        infos = [self.evidence.info(name) for name in self.evidence.names()]
        scratch_bytes = max(
            counting_bytes(self.num_workers), max(self.num_workers, 1) * _PRUNED_BYTES
        ) + (self._num_parameters * 4 if self.keeps_scores else 0)
        stream_bytes = sum(of_folder.buffer_bytes for of_folder in settled)
        return PrunePlan(
            num_tensors=len(infos),
            num_parameters=self._num_parameters,
            importance_passes=self.importance_passes,
            weight_passes=0 if self.base is None else 1,
            read_bytes=self._read_bytes(),
            write_bytes=self.write_bytes,
            pulled_bytes=sum(of_folder.pulled_bytes for of_folder in settled),
            disk_bytes=self.write_bytes + network_load(settled)[1],
            fetch=tuple(map(str, settled)),
            peak_memory_bytes=peak_bytes() + _SPARE_BYTES + scratch_bytes + stream_bytes,
        )

    def load(self, settled: Sequence[Settled]) -> Load:
        """What it asks of the machine, for an estimate of its time.

        Args:
            settled: how the inputs on the Hub are read.
        """
        plan = self.plan(settled)
        streamed_bytes, downloaded_bytes = network_load(settled)
        judged = [] if self.base is None else [self.base.source.info(n) for n in self.judged()]
        nanoseconds = plan.write_bytes * WRITE_NS + sum(info.numel for info in judged) * PRUNE_NS
        if self.scores is not None:
            nanoseconds += plan.importance_passes * self.scores.num_bytes * SCORE_NS
        return Load(
            # What is downloaded is written, and read like what was there.
            disk_bytes=plan.read_bytes - streamed_bytes + downloaded_bytes + plan.write_bytes,
            streamed_bytes=streamed_bytes,
            downloaded_bytes=downloaded_bytes,
            sent_bytes=0,
            processor_seconds=nanoseconds / 1e9,
            num_workers=min(max(self.num_workers, 1), num_processors()),
        )

    def _read_bytes(self) -> int:
        """Scores as often as they are read, base and model once, what is copied again."""
        score_bytes = 0 if self.scores is None else self.scores.num_bytes
        base_bytes = _num_bytes(self.base)
        judged_bytes = _num_bytes(self.base, self.judged())
        weight_bytes = base_bytes + _num_bytes(self.model) + base_bytes - judged_bytes
        return self.importance_passes * score_bytes + weight_bytes


def _num_bytes(checkpoint: Checkpoint | None, names: Iterable[str] | None = None) -> int:
    if checkpoint is None:
        return 0
    source = checkpoint.source
    return sum(source.info(name).nbytes for name in (source.names() if names is None else names))
