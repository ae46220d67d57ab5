"""A sequence of tasks under one method and one seed: train, remember, evaluate, stage by stage.

Stage 0 is the model before any training, stage k the model after task k. Every stage is one folder,
renamed into place only when it is whole:

    00-before/                checkpoint/  predictions/TASK.jsonl  stage.json
    01-TASK/ ... NN-TASK/     the same, and memory.jsonl: the rows kept of this task
    NN-TASK.training/         while a task is being trained: its latest checkpoint

Stages 0 and 1 are the same for all methods (the first task has no memory and is plain training)
and are made once, by :func:`run_start`. Whatever exists is not made again, so that the same call
resumes an interrupted sequence, and goes on from a finished one that was given further tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.atomic import remove_unfinished, whole_folder, write_json
from kifmerge.phases.data import DataOptions, Example, read_examples, write_examples
from kifmerge.phases.evaluate import predict, write_predictions
from kifmerge.phases.memory import select_memory
from kifmerge.phases.model import LoadedModel, ModelOptions, known_labels, load_model
from kifmerge.phases.presets import RecurrentOptions, Rule
from kifmerge.phases.resumable import CHECKPOINT, STATE, newest_step
from kifmerge.phases.scratch import make_base
from kifmerge.phases.state import OPTIMIZER_FILE
from kifmerge.phases.state import STATE_FILE as TRAINER_STATE_FILE
from kifmerge.phases.tasks import Task, TaskOptions
from kifmerge.phases.train import (
    Progress,
    TrainingFolders,
    TrainingOptions,
    TrainingRecord,
    train_task,
    training_device,
)

BEFORE = "before"
ALL_TASKS = "all-tasks"
PREDICTIONS = "predictions"
OPTIMIZER = "optimizer"
MEMORY_FILE = "memory.jsonl"
STAGE_FILE = "stage.json"


@dataclass(frozen=True, slots=True)
class Method:
    """How a method treats a new task.

    Attributes:
        memory: ``unused``; ``mixed`` into the training rows; or ``outer``: in outer steps.
        rule: how rounds are fused where memory is used in outer steps; None takes the recipe's.
        at_once: all tasks together instead of one after the other.
    """

    memory: Literal["unused", "mixed", "outer"]
    rule: Rule | None = None
    at_once: bool = False


MethodName = Literal[
    "sequential",
    "replay-mixed",
    "replay-interleaved",
    "recurrent-average",
    "recurrent-kif",
    "recurrent-kif-adaptive",
    "multitask",
]

METHODS: Mapping[str, Method] = {
    "sequential": Method("unused"),
    "replay-mixed": Method("mixed"),
    "replay-interleaved": Method("outer", "none"),
    "recurrent-average": Method("outer", "average"),
    "recurrent-kif": Method("outer", "recurrent-kif"),
    "recurrent-kif-adaptive": Method("outer", "recurrent-kif-adaptive"),
    "multitask": Method("unused", at_once=True),
}


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
    memory_fraction: float
    evaluation_batch_size: int


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
        stages = method_stages(self._start_dir, directory, self.tasks)
        for number in range(2, len(stages)):
            if not stages[number].exists():
                self._train_stage(stages, method, number)
        self._fill_in(stages[2:])

    def _run_at_once(self, method: Method, directory: Path) -> None:
        folder = at_once_folder(directory, self.tasks)
        if not folder.exists():
            rows = [example for task in self.tasks for example in task.train]
            before = stage_folders(self._start_dir, [])[0]
            loaded, record = self._train(folder, before, rows, [], method, stage=1)
            self._finish_stage(folder, loaded, ALL_TASKS, record=record)
        shutil.rmtree(training_folder(folder), ignore_errors=True)

    def _train_stage(self, stages: Sequence[Path], method: Method, number: int) -> None:
        """Make stage ``number``, all before it being there."""
        task = self.tasks[number - 1]
        memory = [] if method.memory == "unused" else self._remembered(stages[1:number])
        rows = task.train + (memory if method.memory == "mixed" else [])
        outer = memory if method.memory == "outer" else []
        folder = stages[number]
        loaded, record = self._train(folder, stages[number - 1], rows, outer, method, stage=number)
        kept = select_memory(
            task.train, self._options.memory_fraction, seed=self._stage_seed(number)
        )
        self._finish_stage(folder, loaded, task.name, record=record, memory=kept)

    def _remembered(self, stages: Sequence[Path]) -> list[Example]:
        whole = DataOptions(columns={})
        files = [stage / MEMORY_FILE for stage in stages]
        return [
            example
            for file in files
            if file.stat().st_size
            for example in read_examples(str(file), whole)
        ]

    def _train(
        self,
        folder: Path,
        before: Path,
        rows: Sequence[Example],
        memory: Sequence[Example],
        method: Method,
        *,
        stage: int,
    ) -> tuple[LoadedModel, TrainingRecord]:
        """Train the model of the stage ``before``, or go on where an interruption left it."""
        name = folder.name.partition("-")[2]

        def on_progress(progress: Progress) -> None:
            self._on_moment(
                Moment(
                    name,
                    "training",
                    progress.step,
                    progress.num_steps,
                    progress.num_rounds,
                    progress.loss,
                )
            )

        options = self._options
        step_dir = training_folder(folder)
        optimizer_dir = before / OPTIMIZER
        loaded = self._load((newest_step(step_dir) or before) / CHECKPOINT)
        record = train_task(
            loaded,
            rows,
            memory,
            options.training,
            replace(options.recurrent, rule=method.rule) if method.rule else options.recurrent,
            seed=self._stage_seed(stage),
            folders=TrainingFolders(
                steps=step_dir, optimizer=optimizer_dir if optimizer_dir.exists() else None
            ),
            on_progress=on_progress,
        )
        return loaded, record

    def _finish_stage(
        self,
        folder: Path,
        loaded: LoadedModel,
        name: str,
        *,
        record: TrainingRecord | None = None,
        memory: Sequence[Example] | None = None,
    ) -> None:
        with whole_folder(folder) as temporary:
            loaded.save(temporary / CHECKPOINT)
            if record is not None and self._options.training.optimizer_state == "kept":
                self._keep_optimizer(folder, temporary / OPTIMIZER)
            if memory is not None:
                write_examples(temporary / MEMORY_FILE, memory)
            for task in self.tasks:
                self._predict(loaded, task, temporary)
            details = _stage_details(name, self._seed, record)
            write_json(temporary / STAGE_FILE, {**details, "memory_rows": len(memory or [])})
        shutil.rmtree(training_folder(folder), ignore_errors=True)

    def _keep_optimizer(self, folder: Path, directory: Path) -> None:
        """Copy what the next task's optimizer begins with from the last step's state."""
        last = newest_step(training_folder(folder))
        assert last is not None
        directory.mkdir()
        for name in (OPTIMIZER_FILE, TRAINER_STATE_FILE):
            shutil.copyfile(last / STATE / name, directory / name)

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


def method_stages(start_dir: Path, method_dir: Path, tasks: Sequence[Task]) -> list[Path]:
    """All stages of a method: the shared start, then its own."""
    return stage_folders(start_dir, tasks[:1]) + stage_folders(method_dir, tasks)[2:]


def training_folder(stage: Path) -> Path:
    """Where the training of a stage keeps its checkpoints until the stage is finished."""
    return stage.with_name(f"{stage.name}.training")


def at_once_folder(method_dir: Path, tasks: Sequence[Task]) -> Path:
    """The one stage of a method that trains on all tasks together."""
    return method_dir / f"{len(tasks):02d}-{ALL_TASKS}"


def prediction_path(stage: Path, task_name: str) -> Path:
    """Where a stage keeps its predictions on a task."""
    return stage / PREDICTIONS / f"{task_name}.jsonl"


def _stage_details(name: str, seed: int, record: TrainingRecord | None) -> dict[str, Any]:
    details: dict[str, Any] = {"stage": name, "seed": seed}
    if record is not None:
        rounds = [done.as_dict() for done in record.rounds]
        details["training"] = {**asdict(record), "rounds": rounds}
    return details
