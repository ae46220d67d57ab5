"""A sequence of tasks under one method and one seed: train, remember, evaluate, stage by stage.

Stage 0 is the model before any training, stage k the model after task k. Every stage is one folder,
renamed into place only when it is whole:

    00-before/                checkpoint/  predictions/TASK.jsonl  stage.json
    01-TASK/ ... NN-TASK/     the same, and memory.jsonl: the rows kept of this task
    NN-TASK.training/         while a task is being trained: its latest checkpoint

Stages 0 and 1 are the same for all methods (the first task has no memory and is plain training)
and are made once, by :func:`run_start`; the methods of KIF, which score the first task too, share
stage 0 alone, and keep units.json beside each checkpoint. Whatever exists is not made again, so
that the same call resumes an interrupted sequence, and goes on from a finished one that was given
further tasks.

A classifier's head covers the labels of all tasks from the start. Where a finished sequence is
given further tasks it grows: the rows it gains have no history, and KIF takes the new ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import remove_unfinished, whole_folder, write_json
from kifmerge.checkpoint.units import write_units
from kifmerge.models.data import DataOptions, Example, read_examples, write_examples
from kifmerge.models.model import LoadedModel, known_labels, load_model
from kifmerge.models.scratch import make_base
from kifmerge.phases.evaluate import predict, write_predictions
from kifmerge.phases.memory import select_memory
from kifmerge.phases.stage import (
    OPTIMIZER,
    Moment,
    SequenceOptions,
    StageTraining,
    TrainedStage,
    training_folder,
)
from kifmerge.phases.tasks import Task
from kifmerge.training.methods import METHODS, Method
from kifmerge.training.resumable import CHECKPOINT
from kifmerge.training.train import training_device

BEFORE = "before"
ALL_TASKS = "all-tasks"
PREDICTIONS = "predictions"
MEMORY_FILE = "memory.jsonl"
STAGE_FILE = "stage.json"


class TaskSequence:
    """Runs stages under one seed: the shared start, and a method's own stages.

    Args:
        options: model, tasks, training.
        seed: of initialisation, row order, dropout and memory.
        start_dir: folder of the stages all methods share.
        on_moment: told where the sequence is.
    """

    def __init__(
        self,
        options: SequenceOptions,
        seed: int,
        start_dir: Path,
        on_moment: Callable[[Moment], None] = lambda moment: None,
    ) -> None:
        self.tasks = [Task(task) for task in options.tasks]
        self._options = options
        self._seed = seed
        self._start_dir = start_dir
        self._on_moment = on_moment

    def run_start(self) -> None:
        """Make stages 0 and 1, and the base itself if it is to come from scratch."""
        self._start_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self._start_dir)
        stages = stage_folders(self._start_dir, self.tasks[:1])
        if not stages[0].exists():
            self._finish_stage(stages[0], self._load(None), BEFORE)
        if not stages[1].exists():
            self._train_stage(stages, METHODS["sequential"], 1)
        self._fill_in(stages)

    def run_method(self, method: Method, directory: Path) -> None:
        """Make the stages of one method, in ``directory``, from the shared start on."""
        directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(directory)
        if method.at_once:
            self._run_at_once(method, directory)
            return
        stages = method_stages(self._start_dir, directory, self.tasks, method)
        for number in range(method.num_shared_stages, len(stages)):
            if not stages[number].exists():
                self._train_stage(stages, method, number)
        self._fill_in(stages[method.num_shared_stages :])

    def _run_at_once(self, method: Method, directory: Path) -> None:
        folder = at_once_folder(directory, self.tasks)
        if not folder.exists():
            rows = [example for task in self.tasks for example in task.train]
            before = stage_folders(self._start_dir, [])[0]
            training = self._training(folder, method, 1)
            trained = training.train(before, rows, [], is_first_task=True)
            self._finish_stage(folder, trained.loaded, ALL_TASKS, training, trained)
        shutil.rmtree(training_folder(folder), ignore_errors=True)

    def _train_stage(self, stages: Sequence[Path], method: Method, number: int) -> None:
        """Make stage ``number``, all before it being there."""
        task = self.tasks[number - 1]
        memory = [] if method.memory == "unused" else self._remembered(stages[1:number])
        rows = task.train + (memory if method.memory == "mixed" else [])
        apart = memory if method.memory in ("outer", "after") else []
        training = self._training(stages[number], method, number)
        trained = training.train(stages[number - 1], rows, apart, is_first_task=number == 1)
        kept = select_memory(
            task.train, self._options.memory_fraction, seed=self._stage_seed(number)
        )
        self._finish_stage(
            stages[number], trained.loaded, task.name, training, trained, memory=kept
        )

    def _training(self, folder: Path, method: Method, number: int) -> StageTraining:
        return StageTraining(
            self._options,
            method,
            folder,
            seed=self._stage_seed(number),
            load=self._load,
            on_moment=self._on_moment,
        )

    def _remembered(self, stages: Sequence[Path]) -> list[Example]:
        whole = DataOptions(columns={})
        files = [stage / MEMORY_FILE for stage in stages]
        return [
            example
            for file in files
            if file.stat().st_size
            for example in read_examples(str(file), whole)
        ]

    def _finish_stage(
        self,
        folder: Path,
        loaded: LoadedModel,
        name: str,
        training: StageTraining | None = None,
        trained: TrainedStage | None = None,
        *,
        memory: Sequence[Example] | None = None,
    ) -> None:
        with whole_folder(folder) as temporary:
            loaded.save(temporary / CHECKPOINT)
            if training is not None and self._options.training.optimizer_state == "kept":
                training.keep_optimizer(temporary / OPTIMIZER)
            if memory is not None:
                write_examples(temporary / MEMORY_FILE, memory)
            if trained is not None and trained.fused is not None:
                write_units(temporary, trained.fused.units, {"task": name})
            for task in self.tasks:
                self._predict(loaded, task, temporary)
            details = _stage_details(name, self._seed, trained)
            write_json(temporary / STAGE_FILE, {**details, "memory_rows": len(memory or [])})
        shutil.rmtree(training_folder(folder), ignore_errors=True)

    def _fill_in(self, stages: Sequence[Path]) -> None:
        """Evaluate finished stages on tasks that were added since, and tidy up beside them."""
        for stage in stages:
            # Left where a process was killed between finishing a stage and removing this.
            shutil.rmtree(training_folder(stage), ignore_errors=True)
            missing = [t for t in self.tasks if not prediction_path(stage, t.name).exists()]
            if missing:
                checkpoint = stage / CHECKPOINT
                loaded = self._load(checkpoint, labels=known_labels(checkpoint))
                for task in missing:
                    self._predict(loaded, task, stage)

    def _predict(self, loaded: LoadedModel, task: Task, folder: Path) -> None:
        done = 0

        def on_batch(num_rows: int) -> None:
            nonlocal done
            done += num_rows
            self._on_moment(Moment(task.name, "evaluating", done, len(task.test)))

        predictions = predict(
            loaded,
            task.test,
            task.labels if loaded.options.kind == "classifier" else (),
            batch_size=self._options.evaluation_batch_size,
            on_batch=on_batch,
        )
        write_predictions(prediction_path(folder, task.name), predictions)

    def _load(self, checkpoint: Path | None, labels: Sequence[str] | None = None) -> LoadedModel:
        """The model as it starts, or a stage's checkpoint, its head covering all labels."""
        options = self._options.model
        if options.reference is None:
            texts = (e.instruction + e.input for task in self.tasks for e in task.train)
            base_dir = self._start_dir / "base"
            options = make_base(options, texts, base_dir, seed=self._seed)
        if labels is None and options.kind == "classifier":
            labels = list(dict.fromkeys(label for task in self.tasks for label in task.labels))
        loaded = load_model(options, labels or [], seed=self._seed, checkpoint=checkpoint)
        loaded.model.to(training_device(self._options.training))  # type: ignore[arg-type]
        return loaded

    def _stage_seed(self, stage: int) -> int:
        return self._seed * 1000 + stage


def stage_folders(directory: Path, tasks: Sequence[Task]) -> list[Path]:
    """Folders of stages 0 (before) to len(tasks)."""
    names = [BEFORE, *(task.name for task in tasks)]
    return [directory / f"{number:02d}-{name}" for number, name in enumerate(names)]


def method_stages(
    start_dir: Path, method_dir: Path, tasks: Sequence[Task], method: Method
) -> list[Path]:
    """All stages of a method: those of the shared start, then its own."""
    num_shared = method.num_shared_stages
    shared, own = stage_folders(start_dir, tasks[:1]), stage_folders(method_dir, tasks)
    return shared[:num_shared] + own[num_shared:]


def at_once_folder(method_dir: Path, tasks: Sequence[Task]) -> Path:
    """The one stage of a method that trains on all tasks together."""
    return method_dir / f"{len(tasks):02d}-{ALL_TASKS}"


def prediction_path(stage: Path, task_name: str) -> Path:
    """Where a stage keeps its predictions on a task."""
    return stage / PREDICTIONS / f"{task_name}.jsonl"


def _stage_details(name: str, seed: int, trained: TrainedStage | None) -> dict[str, Any]:
    details: dict[str, Any] = {"stage": name, "seed": seed}
    if trained is not None:
        rounds = [done.as_dict() for done in trained.record.rounds]
        details["training"] = {**asdict(trained.record), "rounds": rounds}
        if trained.fused is not None:
            num_units = len(trained.fused.units.units)
            details["kif"] = {"num_units": num_units, **trained.fused.shares}
    return details
