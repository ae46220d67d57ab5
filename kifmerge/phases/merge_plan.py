"""The plan of a merge: passes, bytes and memory, known from headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kifmerge.checkpoint.device import DEVICE_PIECE_BYTES
from kifmerge.checkpoint.sink import Layout
from kifmerge.checkpoint.workers import num_processors, peak_bytes
from kifmerge.fusion.compiled import is_compiled
from kifmerge.fusion.estimate import SCORE_NS, WRITE_NS, Load, model_ns, network_load
from kifmerge.fusion.fetching import Reading, Settled
from kifmerge.fusion.inputs import HistoricalParent, OpenInputs
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.selection import counting_bytes

# Libraries that a merge loads, its threads, and what the allocator keeps between pieces.
_SPARE_BYTES = 28 << 20
# Buffers of all workers together, and of one: where there are many, or more than two models and
# a base, pieces are smaller.
MOST_BUFFER_BYTES = 96 << 20
_WORKER_BUFFER_BYTES = 20 << 20
LEAST_PIECE_BYTES = 1 << 16
# Measured: larger ones leave the cache; smaller ones make two workers wait for the interpreter.
MOST_PIECE_BYTES = 15 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What a merge is going to do.

    Attributes:
        rule: its name.
        historical_parent: where the historical task vector starts, of the two-sided form.
        computed_by: loops that were compiled when kifmerge was installed, or torch.
        num_models: that are merged.
        num_tensors: of the output.
        num_parameters: elements of the output.
        num_unscored_tensors: those that no rule can judge.
        num_files: of the output.
        weight_passes: how often the weights are read. A threshold is counted as two passes, of
            which a sample of what lies on this disk mostly spares one, and may cost one.
        importance_passes: how often scores or masks are read; likewise.
        read_bytes: in all, where no tensors without scores differ.
        write_bytes: of the output's weights.
        pulled_bytes: of weights, scores and masks that come over the network.
        disk_bytes: room that the output and what is downloaded take; of an output on the Hub that
            one file takes, which goes when it has been sent.
        fetch: how each input on the Hub is read, and why.
        peak_memory_bytes: about what the process will need: Python and torch, and the buffers of
            all workers together.
    """

    rule: str
    historical_parent: HistoricalParent | None
    computed_by: Literal["compiled loops", "torch"]
    num_models: int
    num_tensors: int
    num_parameters: int
    num_unscored_tensors: int
    num_files: int
    weight_passes: int
    importance_passes: int
    read_bytes: int
    write_bytes: int
    pulled_bytes: int
    disk_bytes: int
    fetch: tuple[str, ...]
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeNeeds:
    """What a merge needs of disk, network and memory.

    Attributes:
        opened: its inputs.
        rule: the rule and its options.
        layout: of the output.
        num_workers: threads; 0: the caller's own.
        spare_disk: the output goes to the Hub, file by file.
    """

    opened: OpenInputs
    rule: FusionOptions
    layout: Layout
    num_workers: int
    spare_disk: bool

    @property
    def piece_bytes(self) -> int:
        """Of a piece as float32, so that the buffers of all workers stay within their budget."""
        if self.opened.weights.device is not None:
            return DEVICE_PIECE_BYTES
        budget_bytes = min(MOST_BUFFER_BYTES, max(self.num_workers, 1) * _WORKER_BUFFER_BYTES)
        return max(min(MOST_PIECE_BYTES, budget_bytes // self._num_buffers), LEAST_PIECE_BYTES)

    @property
    def _num_buffers(self) -> int:
        """Pieces alive at once: per source as stored, per rule a few, per worker.

        Where torch computes the rule, each source is there as float32 as well.
        """
        of_source = 1.5 if self._is_compiled else 3
        num_sources = len(self.opened.weights.sources)
        return math.ceil(max(self.num_workers, 1) * (of_source * num_sources + 4))

    @property
    def _is_compiled(self) -> bool:
        return is_compiled(self.opened.weights, self.rule)

    @property
    def _scratch_bytes(self) -> int:
        """What all workers take together, and the allocator keeps; measured."""
        buffer_bytes = self._num_buffers * self.piece_bytes
        # What torch is shown of each model takes about as much as the models.
        is_shown = self.rule.needs != "nothing" and not self._is_compiled
        scratch_bytes = _SPARE_BYTES + buffer_bytes * (2 if is_shown else 1)
        is_ranked = self.rule.needs == "masks" and self._has_scores
        if self.rule.needs == "largest" or is_ranked:
            scratch_bytes += counting_bytes(self.num_workers)
        return scratch_bytes

    @property
    def weight_passes(self) -> int:
        """Two passes for a threshold over task vectors, and one to fuse."""
        return 3 if self.rule.needs == "largest" else 1

    @property
    def importance_passes(self) -> int:
        """Two passes for a threshold, one for bounds or means, and one to fuse; masks only that."""
        if not self.opened.evidence_bytes:
            return 0
        if not self._has_scores:
            return 1
        return {"masks": 3, "scores": 2}.get(self.rule.needs, 1)

    @property
    def write_bytes(self) -> int:
        """Of the output's weights."""
        return sum(info.nbytes for infos in self.layout.values() for _, info in infos)

    def readings(self) -> list[Reading]:
        """What is going to be read, in the order of the output's files."""
        return self.opened.readings(
            num_passes=self.weight_passes, num_evidence_passes=self.importance_passes
        )

    def plan(self, settled: Sequence[Settled]) -> MergePlan:
        """All of it.

        Args:
            settled: how the inputs on the Hub are read.
        """
        infos = [info for infos in self.layout.values() for _, info in infos]
        scored = self.opened.scored_names()
        importance_bytes = self.importance_passes * self.opened.evidence_bytes
        stream_bytes = sum(of_folder.buffer_bytes for of_folder in settled)
        return MergePlan(
            rule=self.rule.rule,
            historical_parent=self.opened.historical_parent,
            computed_by="compiled loops" if self._is_compiled else "torch",
            num_models=len(self.opened.inputs.models),
            num_tensors=len(infos),
            num_parameters=sum(info.numel for info in infos),
            num_unscored_tensors=len(infos) - len(scored),
            num_files=len(self.layout),
            weight_passes=self.weight_passes,
            importance_passes=self.importance_passes,
            read_bytes=self._weight_bytes(scored) + importance_bytes,
            write_bytes=self.write_bytes,
            pulled_bytes=sum(of_folder.pulled_bytes for of_folder in settled),
            disk_bytes=self._disk_bytes(settled),
            fetch=tuple(map(str, settled)),
            peak_memory_bytes=peak_bytes() + self._scratch_bytes + stream_bytes,
        )

    def load(self, settled: Sequence[Settled]) -> Load:
        """What it asks of the machine, for an estimate of its time.

        Args:
            settled: how the inputs on the Hub are read.
        """
        plan = self.plan(settled)
        streamed_bytes, downloaded_bytes = network_load(settled)
        # What is downloaded is written, and read like what was there.
        disk_bytes = plan.read_bytes - streamed_bytes + downloaded_bytes + plan.write_bytes
        fusing_ns = model_ns(plan.rule, is_compiled=self._is_compiled)
        nanoseconds = (
            plan.write_bytes * WRITE_NS + plan.num_parameters * plan.num_models * fusing_ns
        )
        if self._has_scores:  # masks cost no more than the rule that reads them
            nanoseconds += plan.importance_passes * self.opened.evidence_bytes * SCORE_NS
        return Load(
            disk_bytes=disk_bytes,
            streamed_bytes=streamed_bytes,
            downloaded_bytes=downloaded_bytes,
            sent_bytes=plan.write_bytes if self.spare_disk else 0,
            processor_seconds=nanoseconds / 1e9,
            num_workers=min(max(self.num_workers, 1), num_processors()),
        )

    @property
    def _has_scores(self) -> bool:
        return bool(self.opened.inputs.importance)

    def _disk_bytes(self, settled: Sequence[Settled]) -> int:
        files = [sum(info.nbytes for _, info in infos) for infos in self.layout.values()]
        out_bytes = max(files, default=0) if self.spare_disk else sum(files)
        return out_bytes + network_load(settled)[1]

    def _weight_bytes(self, scored: Sequence[str]) -> int:
        """What is read of weights: all of them once, what is copied and what is ranked again."""
        sources, weights = self.opened.sources.values(), self.opened.weights
        whole = {id(s): sum(s.info(name).nbytes for name in s.names()) for s in sources}
        judged = {id(s): sum(s.info(name).nbytes for name in scored) for s in sources}
        like = id(self.opened.like.source)
        num_bytes = sum(whole.values()) + whole[like] - judged[like]
        if self.rule.needs == "largest":
            # Two passes for a threshold, over both ends of each task vector.
            ends = [*weights.models, *map(weights.parent, range(len(weights.models)))]
            num_bytes += 2 * sum(judged.get(id(source), 0) for source in ends)
        return num_bytes
