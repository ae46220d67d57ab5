"""Trainers whose checkpoints are ours: whole step folders that training goes on from, bit for bit.

    DIR/step-00000064/checkpoint/    weights, tokenizer, kifmerge.json
    DIR/step-00000064/state/         see kifmerge.training.state

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
from kifmerge.fusion.fuse import Role
from kifmerge.models.model import LoadedModel
from kifmerge.training.guard import GradientGuard
from kifmerge.training.state import (
    read_state,
    restore_generators,
    restore_optimizer,
    write_state,
)
from kifmerge.training.trainer import RecurrentMixin

if TYPE_CHECKING:
    from kifmerge.training.loop import RecurrentLoop

CHECKPOINT = "checkpoint"
STATE = "state"


class ResumableMixin:
    """Gives a Trainer a state and checkpoints of ours.

    The model must hold the weights already when ``train(resume_from_checkpoint=STATE_DIR)`` is
    called: they are kept beside the state, or come from a merge.

    Attributes:
        loaded: what is trained.
        step_dir: keeps the latest checkpoint as a whole step folder.
        identity: what the training is: a state of another is refused.
        first_step: where this training, or phase of one, began.
        last_phase: side whose steps ended the phase before; None at a task's begin or in a phase.
    """

    loaded: LoadedModel
    step_dir: Path
    identity: Mapping[str, Any]
    guard: GradientGuard
    loop: RecurrentLoop | None
    first_step = 0
    last_phase: Role | None = None
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
            self.first_step = content.get("first_step", content["step"])
            self.last_phase = content.get("last_phase")
            self._seconds_before = content["seconds"]
        self._started = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def write_state(self, directory: Path, **figures: Any) -> None:
        """Write the state of this moment, between two steps, into an existing folder."""
        assert isinstance(self, Trainer)
        seconds = self._seconds_before + time.monotonic() - self._started
        figures |= {"num_nonfinite_steps": self.guard.num_skipped, "seconds": seconds}
        write_state(directory, self, self.loop, self.identity, figures)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert isinstance(self, Trainer)
        folder = self.step_dir / f"step-{self.state.global_step:08d}"
        if folder.exists():
            return
        before = _step_folders(self.step_dir)
        with whole_folder(folder) as temporary:
            self.loaded.save(temporary / CHECKPOINT)
            (temporary / STATE).mkdir()
            self.write_state(temporary / STATE, first_step=self.first_step)
        for earlier in before:
            shutil.rmtree(earlier)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert isinstance(self, Trainer)
        if checkpoint is not None:
            restore_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It came with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_generators(Path(checkpoint))


class ResumableTrainer(RecurrentMixin, ResumableMixin, Trainer):
    """A recurrent Trainer that goes on, bit for bit, from the latest checkpoint it kept."""

    def __init__(
        self,
        *args: Any,
        loaded: LoadedModel,
        step_dir: Path,
        identity: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, model=loaded.model, **kwargs)
        self.loaded, self.step_dir, self.identity = loaded, step_dir, identity


def newest_step(step_dir: Path) -> Path | None:
    """The latest whole step folder, cleaned of what a killed process left beside it."""
    if not step_dir.is_dir():
        return None
    remove_unfinished(step_dir)
    folders = _step_folders(step_dir)
    return folders[-1] if folders else None


def _step_folders(step_dir: Path) -> list[Path]:
    return sorted(step_dir.glob("step-*"))
