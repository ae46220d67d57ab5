"""Pruning: the mask of a model's important parameters, and the model with only those changed.

    pruned = base + mask * (model - base)

OUT/mask.safetensors, OUT/mask.json   the mask
OUT/checkpoint/                       the pruned checkpoint, where a model and a base are given
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.companions import copy_companions
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.journal import refuse_full_disk
from kifmerge.checkpoint.mask import DETAIL_FILE
from kifmerge.checkpoint.pieces import read_piece
from kifmerge.checkpoint.provenance import (
    is_made,
    made_by,
    read_details,
    refuse_inputs_inside,
    write_provenance,
)
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.checkpoint.shared_folder import shared_whole_folder
from kifmerge.checkpoint.snapshot import DETAIL_FILE as SNAPSHOT_FILE
from kifmerge.checkpoint.source import FolderSource, MemorySource, Source, read_whole
from kifmerge.checkpoint.units import UnitSource, read_units
from kifmerge.checkpoint.workers import Workers, num_processors, worker_pool
from kifmerge.fusion.agreement import open_checkpoint, refuse_other_evidence
from kifmerge.fusion.checked import FiniteSource
from kifmerge.fusion.estimate import Estimate, Rates, estimate
from kifmerge.fusion.fetching import settle, tell
from kifmerge.fusion.fuse import OnProgress
from kifmerge.fusion.inputs import states
from kifmerge.fusion.meaning import Difference, check_meaning
from kifmerge.fusion.provisional import ProvisionalMarks, is_worth_while
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.selection import Marks, ScoreStream, mark_important, warn_of_equal
from kifmerge.fusion.weights import Nonfinite, Weights
from kifmerge.phases.prune_files import ShowMask, learn_digests, write_mask, write_pruned
from kifmerge.phases.prune_plan import PruneNeeds, PrunePlan
from kifmerge.tensor.selection import Scope, importance_bracket
from kifmerge.tensor.units import important_units

CHECKPOINT_FOLDER = "checkpoint"
_PROVISIONAL_FOLDER = "provisional"
_DEFAULTS = FusionOptions()


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

    show: ShowMask
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
        self._needs = PruneNeeds(
            evidence=self._evidence,
            scores=self._scores,
            base=self._base,
            model=self._model,
            copied=self._model if options.unscored == "model" else self._base,
            scope=options.scope,
            num_workers=self._num_workers,
        )
        self._settled = settle(self._needs.readings(), write_bytes=self._needs.write_bytes)

    @property
    def _evidence_folder(self) -> Folder:
        folder = self.inputs.importance or self.inputs.units
        assert folder is not None
        return folder

    def _important_members(self) -> UnitSource:
        assert self.inputs.units is not None
        assert self._base is not None
        units = read_units(self.inputs.units)
        scores = [unit.score for unit in units.units]
        important = important_units(scores, self.options.important_fraction)
        return UnitSource(units, self._base.source, important, str(self.inputs.units))

    def plan(self) -> PrunePlan:
        """What :meth:`run` is going to do, known from headers alone."""
        return self._needs.plan(self._settled)

    def estimate(self, rates: Rates) -> Estimate:
        """How long :meth:`run` takes at some rates of disk and network."""
        return estimate(self._needs.load(self._settled), rates)

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
        ranks: Ranks = ALONE,
    ) -> tuple[dict[str, Any], bool]:
        """Make the mask, and the pruned checkpoint.

        Args:
            out_dir: the folder to make.
            overwrite: what it holds may go, once the new one is whole.
            on_progress: told the number of parameters marked after each piece.
            ranks: share the work.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input.
            CheckpointError: NaN or infinity, or tensors without scores that differ.
            TryAgainError: the disk has no room.
        """
        refuse_inputs_inside(out_dir, self.inputs.parents.values())
        made = ranks.from_first(lambda: self._find_made(out_dir, overwrite=overwrite))
        if made is not None:
            return made, False
        work = {
            "command": "prune",
            "options": asdict(self.options),
            "inputs": states({role: f for role, f in self.inputs.parents.items() if f is not None}),
        }
        with (
            worker_pool(self._num_workers) as workers,
            shared_whole_folder(out_dir, work, ranks, overwrite=overwrite) as temporary,
        ):
            tell(self._settled)
            provisional_dir = temporary / _PROVISIONAL_FOLDER
            mask = self._find_mask(provisional_dir, workers, ranks)
            if self._model is not None and self._base is not None:
                self._prune_into(temporary, mask, workers, ranks)
            details = self._details(mask, ranks)
            write_mask(temporary, self._evidence, mask.show, details, workers, ranks, on_progress)
            if ranks.is_first:
                shutil.rmtree(provisional_dir, ignore_errors=True)
        return ranks.from_first(lambda: _figures(details)), True

    def _find_made(self, out_dir: Path, *, overwrite: bool) -> dict[str, Any] | None:
        """What the folder tells, if it is what is about to be made; its room on the disk if not."""
        # Asked only of what is there: the answer takes all digests.
        if out_dir.exists() and is_made(
            out_dir, DETAIL_FILE, self._made_by(read_hub=False), overwrite=overwrite
        ):
            return _figures(read_details(out_dir / DETAIL_FILE))
        refuse_full_disk(out_dir, self._needs.write_bytes + self._needs.provisional_bytes)
        return None

    def _find_mask(self, provisional_dir: Path, workers: Workers, ranks: Ranks) -> _Mask:
        if self._scores is None:
            return _Mask(partial(read_piece, self._evidence.read))
        scores: Source = FiniteSource(self._scores)
        role = read_details(self._evidence_folder / SNAPSHOT_FILE).get("role") or "given"
        fraction = self.options.important_fraction
        bracket = None
        if self._needs.keeps_scores and ranks.size == 1:
            scores = MemorySource({name: read_whole(scores, name) for name in scores.names()})
        elif self.options.scope == "global" and ranks.size == 1:
            stream = ScoreStream(scores, num_workers=workers.num)
            bracket = importance_bracket(stream, fraction, spread=workers.map)
            if is_worth_while(bracket):
                provisional_dir.mkdir()
                provisional = ProvisionalMarks(scores, bracket, provisional_dir)
                threshold = provisional.find(workers)
                warn_of_equal([threshold], fraction, role)
                return _Mask(provisional.show, {"threshold": threshold.value})
        marks = mark_important(
            scores, fraction, self.options.scope, role,
            workers=workers, ranks=ranks, bracket=bracket,
        )  # fmt: skip
        return _Mask(marks.show, {"threshold": _threshold(marks)})

    def _details(self, mask: _Mask, ranks: Ranks) -> dict[str, Any]:
        """Content of ``mask.json``; the first rank writes it."""
        learn_digests(self._stored, ranks)
        if not ranks.is_first:
            return {}
        names = self._evidence.names()
        wanted = self._made_by()
        parent = wanted["parents"]["units" if self._scores is None else "importance"]
        return {
            "fraction": self.options.important_fraction,
            "scope": "units" if self._scores is None else self.options.scope,
            **mask.details,
            "num_parameters": sum(self._evidence.info(name).numel for name in names),
            "num_important": 0,
            "snapshot_digest": parent["digest"],
            "made_by": wanted,
        }

    @property
    def _stored(self) -> dict[str, FolderSource]:
        """Role -> the files of every input whose tensors have digests."""
        scores = None if self._scores is None else self._scores.stored
        sources = {
            "importance": scores,
            "model": self._model and self._model.source,
            "base": self._base and self._base.source,
        }
        return {role: s for role, s in sources.items() if isinstance(s, FolderSource)}

    def _prune_into(self, temporary: Path, mask: _Mask, workers: Workers, ranks: Ranks) -> None:
        assert self._base is not None
        assert self._model is not None
        directory = temporary / CHECKPOINT_FOLDER
        directory.mkdir(exist_ok=True)  # whichever rank comes first
        base, models = self._base.source, [self._model.source]
        files = write_pruned(
            directory,
            base,
            Weights(base=base, models=models, nonfinite=self.options.nonfinite),
            self._needs.judged(),
            mask.show,
            unscored="new" if self.options.unscored == "model" else self.options.unscored,
            workers=workers,
            ranks=ranks,
        )
        learn_digests(self._stored, ranks)
        if not ranks.is_first:
            return
        copy_companions(self._base.directory, directory)
        write_provenance(
            directory,
            {
                **self._base.provenance,
                "made_by": self._made_by(),
                "files": files,
                "kifmerge": importlib.metadata.version("kifmerge"),
            },
        )


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
