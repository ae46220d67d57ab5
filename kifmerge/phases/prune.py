"""Pruning: the mask of a model's important parameters, and the model with only those changed.

    pruned = base + mask * (model - base)

OUT/mask.safetensors, OUT/mask.json   the mask
OUT/checkpoint/                       the pruned checkpoint, where a model and a base are given
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.companions import copy_companions
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.journal import refuse_full_disk
from kifmerge.checkpoint.mask import DETAIL_FILE, MaskSink
from kifmerge.checkpoint.pieces import CPU_PIECE_BYTES, Piece, pieces, read_piece, split_piece
from kifmerge.checkpoint.provenance import (
    is_made,
    made_by,
    read_details,
    refuse_inputs_inside,
    write_provenance,
)
from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.checkpoint.sink import FolderSink, layout_of
from kifmerge.checkpoint.snapshot import DETAIL_FILE as SNAPSHOT_FILE
from kifmerge.checkpoint.source import FolderSource, Source
from kifmerge.checkpoint.units import UnitSource, read_units
from kifmerge.checkpoint.workers import Workers, num_processors, peak_bytes, worker_pool
from kifmerge.phases.agreement import Checkpoint, open_checkpoint, refuse_other_evidence
from kifmerge.phases.checked import FiniteSource
from kifmerge.phases.fetching import Reading, settle, tell
from kifmerge.phases.fuse import OnProgress
from kifmerge.phases.meaning import Difference, check_meaning
from kifmerge.phases.rules import FusionOptions
from kifmerge.phases.selection import Marks, counting_bytes, mark_important
from kifmerge.phases.unscored import UnscoredTensors
from kifmerge.phases.weights import Nonfinite, Weights
from kifmerge.tensor.selection import Scope
from kifmerge.tensor.units import important_units

CHECKPOINT_FOLDER = "checkpoint"
_DEFAULTS = FusionOptions()
# What one worker takes for a piece: both models', scores or mask, and what comes of them.
_PRUNED_BYTES = 6 * CPU_PIECE_BYTES
# Libraries, threads, and what the allocator keeps between pieces.
_SPARE_BYTES = 24 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """How a mask is made.

    Attributes:
        important_fraction: f, the share of parameters, or units, found important.
        scope: one threshold over the whole model (``global``) or one per ``tensor``.
        unscored: whose tensors without scores the pruned checkpoint gets where base and model
            differ; None refuses them.
        allowed: differences between base and model that are meant.
        nonfinite: NaN and infinity in the weights are refused, or carried on (``keep``).
    """

    important_fraction: float = _DEFAULTS.important_fraction
    scope: Scope = _DEFAULTS.scope
    unscored: Literal["base", "model"] | None = None
    allowed: tuple[Difference, ...] = ()
    nonfinite: Nonfinite = "refuse"

    def __post_init__(self) -> None:
        """Refuse what the loop refuses too."""
        FusionOptions(important_fraction=self.important_fraction, scope=self.scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneInputs:
    """Folders that a pruning reads.

    Attributes:
        importance: importance snapshot.
        units: skill units, instead.
        model: checkpoint to prune; None makes the mask alone.
        base: what its parameters go back to where they are not important; given with ``model``.

    Raises:
        ValueError: what is missing or too much.
    """

    importance: Folder | None = None
    units: Folder | None = None
    model: Folder | None = None
    base: Folder | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if (self.model is None) != (self.base is None):
            raise ValueError("a pruned checkpoint takes both a model and its base")
        if (self.importance is None) == (self.units is None):
            raise ValueError("a mask is made from an importance snapshot or from skill units")
        if self.units is not None and self.base is None:
            raise ValueError("units tell no shapes: a mask of them takes a model and its base")

    @property
    def parents(self) -> dict[str, Folder | None]:
        """All of them, under the names that are recorded."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class _Mask:
    """What is important, piece by piece, and what is known of it beforehand."""

    show: Callable[[Piece], Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)


class Prune:
    """A pruning whose inputs have been opened and found to belong together.

    Args:
        inputs: the folders.
        options: how the mask is made.
        num_workers: threads; None: one per processor.

    Raises:
        ValueError: options that mean nothing here.
        CheckpointError: an input that cannot be used, or that does not belong to the others.
    """

    def __init__(
        self, inputs: PruneInputs, options: PruneOptions, *, num_workers: int | None = None
    ) -> None:
        if inputs.model is None and options.unscored is not None:
            raise ValueError("tensors without scores matter only where a model is pruned")
        if inputs.units is not None and options.scope != _DEFAULTS.scope:
            raise ValueError("units have one threshold over the whole model")
        self.inputs = inputs
        self.options = options
        self._num_workers = num_processors() if num_workers is None else num_workers
        self._model = None if inputs.model is None else open_checkpoint("model", inputs.model)
        self._base = None if inputs.base is None else open_checkpoint("base", inputs.base)
        self._scores: Scores | None = None
        self._evidence: Source
        if inputs.importance is not None:
            self._evidence = self._scores = open_scores(inputs.importance)
        else:
            self._evidence = self._important_members()
        if self._model is not None and self._base is not None:
            check_meaning([self._base, self._model], options.allowed)
            given = {"model": (self._evidence_folder, self._evidence)}
            refuse_other_evidence(self._base.source, given)
        self._settled = settle(self._readings(), write_bytes=self._write_bytes)

    @property
    def _evidence_folder(self) -> Folder:
        folder = self.inputs.importance or self.inputs.units
        assert folder is not None
        return folder

    def _readings(self) -> list[Reading]:
        """What is going to be read, in the order of the base's files."""
        found = []
        if self._scores is not None and isinstance(self._scores.stored, FolderSource):
            stored = self._scores.stored
            passes = self._importance_passes
            found.append(Reading(source=stored, names=stored.names(), num_passes=passes))
        if self._base is not None and self._model is not None:
            names, judged = self._base.source.names(), frozenset(self._judged)
            unjudged = [name for name in names if name not in judged]
            copied = self._model if self.options.unscored == "model" else self._base
            found += [
                Reading(source=self._base.source, names=names),
                Reading(source=self._model.source, names=names),
                Reading(source=copied.source, names=unjudged),
            ]
        return [reading for reading in found if reading.names]

    @property
    def _importance_passes(self) -> int:
        """Two passes for the threshold, one to mark, one to prune."""
        return 0 if self._scores is None else 3 + (self._base is not None)

    @property
    def _write_bytes(self) -> int:
        infos = [self._evidence.info(name) for name in self._evidence.names()]
        return sum(-(-info.numel // 8) for info in infos) + _num_bytes(self._base)

    def _important_members(self) -> UnitSource:
        assert self.inputs.units is not None
        assert self._base is not None
        units = read_units(self.inputs.units)
        scores = [unit.score for unit in units.units]
        important = important_units(scores, self.options.important_fraction)
        return UnitSource(units, self._base.source, important, str(self.inputs.units))

    def plan(self) -> dict[str, Any]:
        """Tensors, passes, bytes and memory, known from headers alone."""
        infos = [self._evidence.info(name) for name in self._evidence.names()]
        importance_passes = self._importance_passes
        importance_bytes = 0 if self._scores is None else self._scores.num_bytes
        weight_bytes = _num_bytes(self._base)
        judged = [] if self._base is None else [self._base.source.info(n) for n in self._judged]
        copied_bytes = weight_bytes - sum(info.nbytes for info in judged)
        return {
            "num_tensors": len(infos),
            "num_parameters": sum(info.numel for info in infos),
            "importance_passes": importance_passes,
            "weight_passes": 0 if self._base is None else 1,
            "read_bytes": importance_passes * importance_bytes
            + weight_bytes
            + _num_bytes(self._model)
            + copied_bytes,
            "write_bytes": self._write_bytes,
            "pulled_bytes": sum(settled.pulled_bytes for settled in self._settled),
            "fetch": list(map(str, self._settled)),
            "peak_memory_bytes": peak_bytes()
            + _SPARE_BYTES
            + max(counting_bytes(self._num_workers), max(self._num_workers, 1) * _PRUNED_BYTES),
        }

    @property
    def _judged(self) -> list[str]:
        """Names of the base's tensors that the mask speaks of, in the order of its files."""
        assert self._base is not None
        scored = frozenset(self._evidence.names())
        return [name for name in self._base.source.names() if name in scored]

    def _made_by(self, *, read_hub: bool = True) -> dict[str, Any]:
        """What is recorded of how the output is made. Reads all that has not been read yet.

        Args:
            read_hub: what is on the Hub too, which is known by its commits otherwise.
        """
        sources = {
            "importance": self._scores,
            "model": self._model and self._model.source,
            "base": self._base and self._base.source,
        }
        parents = self.inputs.parents
        digests = {
            role: source.fingerprint()
            for role, source in sources.items()
            if source and (read_hub or isinstance(parents[role], Path))
        }
        return made_by("prune", asdict(self.options), parents, digests)

    def run(
        self,
        out_dir: Path,
        *,
        overwrite: bool = False,
        on_progress: OnProgress = lambda num_marked: None,
    ) -> tuple[dict[str, Any], bool]:
        """Make the mask, and the pruned checkpoint.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input.
            CheckpointError: NaN or infinity, or tensors without scores that differ.
            TryAgainError: the disk has no room.
        """
        refuse_inputs_inside(out_dir, self.inputs.parents.values())
        # Asked only of what is there: the answer takes all digests.
        if out_dir.exists() and is_made(
            out_dir, DETAIL_FILE, self._made_by(read_hub=False), overwrite=overwrite
        ):
            return _figures(read_details(out_dir / DETAIL_FILE)), False
        refuse_full_disk(out_dir, self.plan()["write_bytes"])
        with (
            worker_pool(self._num_workers) as workers,
            whole_folder(out_dir, overwrite=overwrite) as temporary,
        ):
            tell(self._settled)
            mask = self._find_mask(workers)
            if self._model is not None and self._base is not None:
                self._prune_into(temporary / CHECKPOINT_FOLDER, mask, workers)
            details = self._write_mask(temporary, mask, workers, on_progress)
        return _figures(details), True

    def _find_mask(self, workers: Workers) -> _Mask:
        if self._scores is None:
            return _Mask(partial(read_piece, self._evidence.read))
        details = read_details(self._evidence_folder / SNAPSHOT_FILE)
        marks = mark_important(
            FiniteSource(self._scores),
            self.options.important_fraction,
            self.options.scope,
            details.get("role") or "given",
            workers=workers,
        )
        return _Mask(marks.show, {"threshold": _threshold(marks)})

    def _write_mask(
        self,
        directory: Path,
        mask: _Mask,
        workers: Workers,
        on_progress: OnProgress,
    ) -> dict[str, Any]:
        names = self._evidence.names()
        wanted = self._made_by()
        parent = wanted["parents"]["units" if self._scores is None else "importance"]
        details = {
            "fraction": self.options.important_fraction,
            "scope": "units" if self._scores is None else self.options.scope,
            **mask.details,
            "num_parameters": sum(self._evidence.info(name).numel for name in names),
            "num_important": 0,
            "snapshot_digest": parent["digest"],
            "made_by": wanted,
        }
        shapes = ((name, self._evidence.info(name).shape) for name in names)
        sink = MaskSink(directory, shapes, details)

        def write_piece(piece: Piece) -> tuple[int, int]:
            shown = mask.show(piece)
            for part, values in split_piece(shown, piece):
                sink.add(part.name, part.start, values)
            return shown.numel(), int(torch.count_nonzero(shown))

        for num_marked, num_important in workers.map(write_piece, pieces(self._evidence, names)):
            details["num_important"] += num_important  # written when the sink commits
            on_progress(num_marked)
        sink.commit()
        return details

    def _prune_into(self, directory: Path, mask: _Mask, workers: Workers) -> None:
        assert self._base is not None
        assert self._model is not None
        base, model = self._base.source, self._model.source
        directory.mkdir()
        weights = Weights(base=base, models=[model], nonfinite=self.options.nonfinite)
        judged = self._judged
        unscored = [name for name in base.names() if name not in frozenset(judged)]
        choice: Literal["base", "new"] | None
        choice = "new" if self.options.unscored == "model" else self.options.unscored
        copies = UnscoredTensors(unscored, weights, choice, workers)
        sink = FolderSink(directory, base.stem, layout_of(base))

        chosen, other = (
            source if self.options.nonfinite == "keep" else FiniteSource(source)
            for source in (model, base)
        )

        def prune_piece(piece: Piece) -> None:
            # Chosen, not computed: base + (model - base) would round.
            kept = read_piece(other.read, piece)
            pruned = torch.where(
                mask.show(piece), read_piece(chosen.read, piece).to(kept.dtype), kept
            )
            for part, values in split_piece(pruned, piece):
                sink.add(part.name, part.start, values)

        work = pieces(base, judged, kind_of=lambda name: model.info(name).dtype)
        for _ in workers.map(prune_piece, work):
            pass
        copies.copy(unscored, sink)
        sink.commit()
        copy_companions(self._base.directory, directory)
        files = {r.name: {"sha256": r.sha256, "bytes": r.num_bytes} for r in sink.records.values()}
        write_provenance(
            directory,
            {
                **self._base.provenance,
                "made_by": self._made_by(),
                "files": files,
                "kifmerge": importlib.metadata.version("kifmerge"),
            },
        )


def _num_bytes(checkpoint: Checkpoint | None) -> int:
    if checkpoint is None:
        return 0
    return sum(checkpoint.source.info(name).nbytes for name in checkpoint.source.names())


def _threshold(marks: Marks) -> float | dict[str, float]:
    if marks.threshold is not None:
        return marks.threshold
    return {name: threshold.value for name, threshold in marks.thresholds.items()}


def _figures(details: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a mask: all but where it came from, and thresholds by the hundred."""
    shown = ["fraction", "scope", "threshold", "num_parameters", "num_important"]
    if not isinstance(details.get("threshold"), float):
        shown.remove("threshold")
    return {key: details[key] for key in shown}
