"""Pruning: the mask of a model's important parameters, and the model with only those changed.

    pruned = base + mask * (model - base)

OUT/mask.safetensors, OUT/mask.json   the mask
OUT/checkpoint/                       the pruned checkpoint, where a model and a base are given
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.mask import DETAIL_FILE, MaskSink
from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.provenance import is_made, made_by, read_details, write_provenance
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.sink import FolderSink, copy_companions, layout_of
from kifmerge.checkpoint.snapshot import DETAIL_FILE as SNAPSHOT_FILE
from kifmerge.errors import RunError
from kifmerge.phases.agreement import (
    Checkpoint,
    open_checkpoint,
    refuse_differing,
    refuse_other_evidence,
)
from kifmerge.phases.checked import FiniteSource
from kifmerge.phases.fuse import OnProgress, Weights
from kifmerge.phases.presets import RecurrentOptions
from kifmerge.phases.selection import Marks, mark_important
from kifmerge.phases.unscored import copy_unscored
from kifmerge.tensor.selection import Scope

CHECKPOINT_FOLDER = "checkpoint"
_DEFAULTS = RecurrentOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """How a mask is made.

    Attributes:
        important_fraction: f, the share of parameters found important.
        scope: one threshold over the whole model (``global``) or one per ``tensor``.
        unscored: whose tensors without scores the pruned checkpoint gets where base and model
            differ; None refuses them.
    """

    important_fraction: float = _DEFAULTS.important_fraction
    scope: Scope = _DEFAULTS.scope
    unscored: Literal["base", "model"] | None = None

    def __post_init__(self) -> None:
        """Refuse what the loop refuses too."""
        RecurrentOptions(important_fraction=self.important_fraction, scope=self.scope)


class Prune:
    """A pruning whose inputs have been opened and found to belong together.

    Args:
        importance: folder of the snapshot.
        options: how the mask is made.
        model: checkpoint to prune, or None to make the mask alone.
        base: what its parameters go back to where they are not important; given with ``model``.

    Raises:
        ValueError: one of model and base without the other.
        CheckpointError: an input that cannot be used, or that does not belong to the others.
    """

    def __init__(
        self,
        importance: Path,
        options: PruneOptions,
        *,
        model: Path | None = None,
        base: Path | None = None,
    ) -> None:
        if (model is None) != (base is None):
            raise ValueError("a pruned checkpoint takes both a model and its base")
        if model is None and options.unscored is not None:
            raise ValueError("tensors without scores matter only where a model is pruned")
        self.options = options
        self._paths = {"importance": importance, "model": model, "base": base}
        self._scores = open_scores(importance)
        self._model = None if model is None else open_checkpoint("model", model)
        self._base = None if base is None else open_checkpoint("base", base)
        if self._model is not None and self._base is not None:
            refuse_differing([self._base, self._model])
            refuse_other_evidence(self._base.source, {"model": (importance, self._scores)})

    def plan(self) -> dict[str, Any]:
        """Tensors, passes, bytes to read and to write, known from headers alone."""
        infos = [self._scores.info(name) for name in self._scores.names()]
        mask_bytes = sum(-(-info.numel // 8) for info in infos)
        weight_bytes = _num_bytes(self._base)
        # A digest of everything, two passes for the threshold, one to mark; one to prune.
        importance_passes = 4 + (self._base is not None)
        return {
            "num_tensors": len(infos),
            "num_parameters": sum(info.numel for info in infos),
            "importance_passes": importance_passes,
            "weight_passes": 2 if self._base is not None else 0,
            "read_bytes": importance_passes * self._scores.num_bytes + 4 * weight_bytes,
            "write_bytes": mask_bytes + weight_bytes,
        }

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
        """
        for path in filter(None, self._paths.values()):
            if out_dir.resolve() in path.resolve().parents:
                raise RunError(f"{out_dir} holds an input, {path}: choose another folder")
        wanted = made_by("prune", asdict(self.options), self._paths)
        if is_made(out_dir, DETAIL_FILE, wanted, overwrite=overwrite):
            return _figures(read_details(out_dir / DETAIL_FILE)), False
        marks = self._marks()
        with whole_folder(out_dir, overwrite=overwrite) as temporary:
            if self._model is not None and self._base is not None:
                self._prune_into(temporary / CHECKPOINT_FOLDER, marks, wanted)
            details = self._write_mask(temporary, marks, wanted, on_progress)
        return _figures(details), True

    def _marks(self) -> Marks:
        details = read_details(Path(str(self._paths["importance"])) / SNAPSHOT_FILE)
        role = details.get("role") or "given"
        return mark_important(
            FiniteSource(self._scores), self.options.important_fraction, self.options.scope, role
        )

    def _write_mask(
        self, directory: Path, marks: Marks, wanted: Mapping[str, Any], on_progress: OnProgress
    ) -> dict[str, Any]:
        names = self._scores.names()
        each = {name: threshold.value for name, threshold in marks.thresholds.items()}
        counted = marks.thresholds.values() if marks.threshold is None else [_any_of(marks)]
        details = {
            "fraction": self.options.important_fraction,
            "scope": self.options.scope,
            "threshold": each if marks.threshold is None else marks.threshold,
            "num_parameters": sum(threshold.num_scores for threshold in counted),
            "num_important": sum(threshold.num_above for threshold in counted),
            "snapshot_digest": wanted["parents"]["importance"]["digest"],
            "made_by": wanted,
        }
        shapes = ((name, self._scores.info(name).shape) for name in names)
        sink = MaskSink(directory, shapes, details)
        for piece in pieces(self._scores, names):
            mask = marks.show(piece)
            for part, values in split_piece(mask, piece):
                sink.add(part.name, part.start, values)
            on_progress(mask.numel())
        sink.commit()
        return details

    def _prune_into(self, directory: Path, marks: Marks, wanted: Mapping[str, Any]) -> None:
        assert self._base is not None
        assert self._model is not None
        base, model = FiniteSource(self._base.source), FiniteSource(self._model.source)
        directory.mkdir()
        sink = FolderSink(directory, self._base.source.stem, layout_of(self._base.source))
        scored = set(self._scores.names())
        unscored = [name for name in base.names() if name not in scored]
        weights = Weights(base=base, new=model, historical=base, historical_parent="base")
        choice: Literal["base", "new"] | None
        choice = "new" if self.options.unscored == "model" else self.options.unscored
        copy_unscored(unscored, weights, choice, sink)
        for piece in pieces(base, [name for name in base.names() if name in scored]):
            # Chosen, not computed: base + (model - base) would round.
            pruned = torch.where(
                marks.show(piece),
                read_piece(model.read, piece),
                read_piece(base.read, piece),
            )
            for part, values in split_piece(pruned, piece):
                sink.add(part.name, part.start, values)
        sink.commit()
        copy_companions(self._base.directory, directory)
        version = importlib.metadata.version("kifmerge")
        content = {**self._base.provenance, "made_by": wanted, "kifmerge": version}
        write_provenance(directory, content)


def _num_bytes(checkpoint: Checkpoint | None) -> int:
    if checkpoint is None:
        return 0
    return sum(checkpoint.source.info(name).nbytes for name in checkpoint.source.names())


def _any_of(marks: Marks) -> Any:
    return next(iter(marks.thresholds.values()))


def _figures(details: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a mask: all but where it came from, and thresholds by the hundred."""
    shown = ["fraction", "scope", "threshold", "num_parameters", "num_important"]
    if isinstance(details["threshold"], dict):
        shown.remove("threshold")
    return {key: details[key] for key in shown}
