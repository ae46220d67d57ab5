"""Training of one stage of a sequence, from the stage before it: learn, fuse, go over memory.

Beside the stage a folder keeps where training stands, so that it goes on wherever a process was
killed. What needs no training is made again from there, to the same bytes:

    NN-TASK.training/step-*/           of the task
    NN-TASK.training/memory/step-*/    of the pass over memory that KIF-M makes after the fusion
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from kifmerge.checkpoint.units import Units
from kifmerge.models.data import Example
from kifmerge.models.model import LoadedModel, ModelOptions
from kifmerge.phases.tasks import TaskOptions
from kifmerge.training.kif import FusedTask, fuse_task, important_elements, refuse_converted
from kifmerge.training.kif_training import KifTraining
from kifmerge.training.methods import Method
from kifmerge.training.presets import KifOptions, RecurrentOptions
from kifmerge.training.resumable import CHECKPOINT, STATE, newest_step
from kifmerge.training.state import OPTIMIZER_FILE
from kifmerge.training.state import STATE_FILE as TRAINER_STATE_FILE
from kifmerge.training.train import (
    Progress,
    TrainingFolders,
    TrainingOptions,
    TrainingRecord,
    train_task,
)

OPTIMIZER = "optimizer"
MEMORY_PASS = "memory"


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a sequence is: for a progress display."""

    task: str
    activity: Literal["training", "evaluating"]
    done: int
    total: int
    num_rounds: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOptions:
    """All that a sequence needs but its method and seed."""

    model: ModelOptions
    tasks: Sequence[TaskOptions]
    training: TrainingOptions
    recurrent: RecurrentOptions
    kif: KifOptions
    memory_fraction: float
    evaluation_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStage:
    """What training made of a stage.

    Attributes:
        loaded: the model, as the stage keeps it.
        record: what was done.
        fused: under the methods of KIF, what it found of the task.
    """

    loaded: LoadedModel
    record: TrainingRecord
    fused: FusedTask | None = None


class StageTraining:
    """Trains one stage.

    Args:
        options: of the sequence.
        method: how the task is treated.
        folder: of the stage, which is not there yet.
        seed: of row order, dropout and memory batches.
        load: loads a checkpoint.
        on_moment: told where the training is.
    """

    def __init__(
        self,
        options: SequenceOptions,
        method: Method,
        folder: Path,
        *,
        seed: int,
        load: Callable[[Path], LoadedModel],
        on_moment: Callable[[Moment], None],
    ) -> None:
        self._options = options
        self._method = method
        self._folder = folder
        self._seed = seed
        self._load = load
        self._on_moment = on_moment

    def train(
        self,
        before: Path,
        rows: Sequence[Example],
        memory: Sequence[Example],
        *,
        is_first_task: bool,
    ) -> TrainedStage:
        """Train the model of the stage before, or go on where an interruption left it.

        Args:
            before: stage to begin with.
            rows: of the new task.
            memory: rows of earlier tasks, for the methods that use them apart.
            is_first_task: whether there is nothing to fuse it with.
        """
        rule = self._method.kif
        if rule is None:
            return self._learn(before, rows, memory, self._recurrent())
        stage = self._learn(before, rows, [], self._kif_training())
        last = newest_step(training_folder(self._folder))
        assert last is not None
        fused = fuse_task(
            stage.loaded.model,
            None if is_first_task else before,
            last / STATE,
            rule,
            self._options.kif,
        )
        stage = replace(stage, fused=fused)
        if fused.historical is None or not memory:
            return stage
        return self._train_on_memory(stage, memory, fused.historical)

    def _recurrent(self) -> RecurrentOptions:
        recurrent, rule = self._options.recurrent, self._method.rule
        return replace(recurrent, rule=rule) if rule else recurrent

    def _learn(
        self,
        before: Path,
        rows: Sequence[Example],
        memory: Sequence[Example],
        variant: RecurrentOptions | KifTraining,
    ) -> TrainedStage:
        step_dir = training_folder(self._folder)
        optimizer_dir = before / OPTIMIZER
        loaded = self._load((newest_step(step_dir) or before) / CHECKPOINT)
        if isinstance(variant, KifTraining):
            refuse_converted(loaded.model)
        record = train_task(
            loaded,
            rows,
            memory,
            self._options.training,
            variant,
            seed=self._seed,
            folders=TrainingFolders(
                steps=step_dir, optimizer=optimizer_dir if optimizer_dir.exists() else None
            ),
            on_progress=self._tell,
        )
        return TrainedStage(loaded=loaded, record=record)

    def _train_on_memory(
        self, stage: TrainedStage, memory: Sequence[Example], historical: Units
    ) -> TrainedStage:
        """The pass of KIF-M: only units important to earlier tasks train, the rest is frozen.

        A reconstruction from notes on the paper, unverified: there is no code of it.
        """
        kif, training = self._options.kif, self._options.training
        step_dir = training_folder(self._folder) / MEMORY_PASS
        interrupted = newest_step(step_dir)
        loaded = stage.loaded if interrupted is None else self._load(interrupted / CHECKPOINT)
        own_rate = kif.memory_learning_rate
        record = train_task(
            loaded,
            memory,
            [],
            replace(
                training,
                epochs=1,
                max_steps=kif.memory_steps,
                learning_rate=training.learning_rate if own_rate is None else own_rate,
                schedule="constant",
            ),
            self._kif_training(
                important_elements(loaded.model, historical, kif.important_fraction)
            ),
            seed=self._seed,
            folders=TrainingFolders(steps=step_dir),
            on_progress=self._tell,
        )
        return replace(stage, loaded=loaded, record=_with_pass(stage.record, record))

    def _kif_training(self, trained: Mapping[str, Tensor] | None = None) -> KifTraining:
        options = self._options
        return KifTraining(kif=options.kif, recurrent=options.recurrent, trained=trained)

    def _tell(self, progress: Progress) -> None:
        self._on_moment(
            Moment(
                self._folder.name.partition("-")[2],
                "training",
                progress.step,
                progress.num_steps,
                progress.num_rounds,
                progress.loss,
            )
        )

    def keep_optimizer(self, directory: Path) -> None:
        """Copy what the next task's optimizer begins with from the last step's state."""
        last = newest_step(training_folder(self._folder))
        assert last is not None
        directory.mkdir()
        for name in (OPTIMIZER_FILE, TRAINER_STATE_FILE):
            shutil.copyfile(last / STATE / name, directory / name)


def training_folder(stage: Path) -> Path:
    """Where the training of a stage keeps its checkpoints until the stage is finished."""
    return stage.with_name(f"{stage.name}.training")


def _with_pass(record: TrainingRecord, memory_pass: TrainingRecord) -> TrainingRecord:
    """The record of a task with that of its pass over memory, whose steps count as outer ones."""
    return replace(
        record,
        num_outer_steps=memory_pass.num_steps,
        num_nonfinite_steps=record.num_nonfinite_steps + memory_pass.num_nonfinite_steps,
        train_seconds=record.train_seconds + memory_pass.train_seconds,
    )
