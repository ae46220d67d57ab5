"""Trainers whose checkpoints are ours: whole step folders that training goes on from, bit for bit.

    DIR/step-00000064/checkpoint/    weights, tokenizer, kifmerge.json
    DIR/step-00000064/state/         see kifmerge.phases.state

A step folder appears only when it is whole; the one before it goes afterwards, so that there is
always a good one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from kifmerge.checkpoint.atomic import remove_unfinished, whole_folder
from kifmerge.phases.guard import GradientGuard
from kifmerge.phases.model import LoadedModel
from kifmerge.phases.state import (
    read_state,
    restore_generators,
    restore_optimizer,
    write_state,
)
from kifmerge.phases.trainer import RecurrentMixin

if TYPE_CHECKING:
    from kifmerge.phases.loop import RecurrentLoop

CHECKPOINT = "checkpoint"
STATE = "state"


class StateMixin:
    """Reads a Trainer's state from a folder that :func:`kifmerge.phases.state.write_state` made.

    The model must hold the weights already when ``train(resume_from_checkpoint=STATE_DIR)`` is
    called: they are kept beside the state, or come from a merge.
    """

    identity: Mapping[str, Any]
    guard: GradientGuard
    loop: RecurrentLoop | None
    _seconds_before = 0.0
    _started = 0.0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the state in a folder if one is given.

        Raises:
            CheckpointError: no such state, or another training's.
        """
        if resume_from_checkpoint is not None:
            content = read_state(Path(resume_from_checkpoint), self.identity)
            self.guard.num_skipped = content["num_nonfinite_steps"]
            self._seconds_before = content["seconds"]
        self._started = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def write_state(self, directory: Path) -> None:
        """Write the state of this moment, between two steps, into an existing folder."""
        assert isinstance(self, Trainer)
        figures = {
            "num_nonfinite_steps": self.guard.num_skipped,
            "seconds": self._seconds_before + time.monotonic() - self._started,
        }
        write_state(directory, self, self.loop, self.identity, figures)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert isinstance(self, Trainer)
        if checkpoint is not None:
            restore_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It came with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        assert isinstance(self, Trainer)
        if checkpoint is not None:
            restore_generators(Path(checkpoint), self.args.process_index)


class ResumableTrainer(RecurrentMixin, StateMixin, Trainer):
    """A recurrent Trainer that keeps its latest checkpoint as a whole step folder."""

    def __init__(
        self,
        *args: Any,
        loaded: LoadedModel,
        step_dir: Path,
        identity: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, model=loaded.model, **kwargs)
        self.identity = identity
        self._loaded = loaded
        self._step_dir = step_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.should_save:
            self.write_state(self._step_dir)  # only takes part
            return
        folder = self._step_dir / f"step-{self.state.global_step:08d}"
        if folder.exists():
            return
        before = _step_folders(self._step_dir)
        with whole_folder(folder) as temporary:
            self._loaded.save(temporary / CHECKPOINT)
            (temporary / STATE).mkdir()
            self.write_state(temporary / STATE)
        for earlier in before:
            shutil.rmtree(earlier)


def newest_step(step_dir: Path) -> Path | None:
    """The latest whole step folder, cleaned of what a killed process left beside it."""
    if not step_dir.is_dir():
        return None
    remove_unfinished(step_dir)
    folders = _step_folders(step_dir)
    return folders[-1] if folders else None


def _step_folders(step_dir: Path) -> list[Path]:
    return sorted(step_dir.glob("step-*"))
