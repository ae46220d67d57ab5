"""Training on one task: plain, or with the recurrent loop over a memory of earlier ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import RunError, check_at_least
from kifmerge.models.data import Example
from kifmerge.models.encode import collator, training_features
from kifmerge.models.model import LoadedModel
from kifmerge.training.kif_training import KifTrainer, KifTraining
from kifmerge.training.loop import STATE_COUNTERS
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.recurrent import Round
from kifmerge.training.resumable import STATE, newest_step
from kifmerge.training.state import STATE_FILE, TRAINER_FILE, begin_with_optimizer, read_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """Optimization of one task.

    Attributes:
        epochs: passes over the task's rows.
        max_steps: optimizer steps instead of epochs.
        batch_size: rows of one micro-batch.
        accumulation: micro-batches per optimizer step.
        learning_rate: at its height.
        schedule: transformers' name of the learning-rate schedule, anew for each task.
        warmup_steps: until the learning rate is at its height.
        optimizer: transformers' name of it.
        weight_decay: of the optimizer.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        optimizer_state: each task begins with a ``fresh`` optimizer, or with the moments ``kept``
            from the task before; the learning rate follows its schedule anew either way.
        save_steps: optimizer steps between two checkpoints that an interrupted training goes on
            from; in the recurrent loop the end of the round is waited for.
        precision: ``float32``, or mixed with ``bf16`` or ``fp16``.
        device: ``auto`` takes an accelerator if there is one, ``cpu`` does not.
    """

    epochs: float = 3
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    optimizer: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    save_steps: int = 200
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and names that transformers does not know."""
        check_at_least(
            self, max_steps=1, batch_size=1, accumulation=1, warmup_steps=0, save_steps=1,
            learning_rate=0, weight_decay=0, max_grad_norm=0,
        )  # fmt: skip
        if self.epochs <= 0:
            raise ValueError(f"epochs must be more than 0, found {self.epochs}")
        for name, known in (("schedule", SchedulerType), ("optimizer", OptimizerNames)):
            choices = [str(choice.value) for choice in known]
            if getattr(self, name) not in choices:
                near = difflib.get_close_matches(getattr(self, name), choices, n=1)
                hint = f": did you mean {near[0]}?" if near else f" of {', '.join(choices)}"
                raise ValueError(f"{name}: {getattr(self, name)!r} is none{hint}")


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of training: optimizer steps done of how many, rounds fused, the last loss."""

    step: int
    num_steps: int
    num_rounds: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What training on one task did; ``losses`` holds one mean per logging interval."""

    num_steps: int
    num_outer_steps: int
    num_nonfinite_steps: int
    train_seconds: float
    losses: list[float] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFolders:
    """Folders of one training.

    Attributes:
        steps: keeps the latest checkpoint, at the end that of the last step.
        optimizer: state of an earlier task whose optimizer this one begins with, if any.
    """

    steps: Path
    optimizer: Path | None = None


def train_task(
    loaded: LoadedModel,
    examples: Sequence[Example],
    memory: Sequence[Example],
    options: TrainingOptions,
    variant: RecurrentOptions | KifTraining | None,
    *,
    seed: int,
    folders: TrainingFolders,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainingRecord:
    """Train a model in place on the rows of one task, or go on where an interruption left it.

    Args:
        loaded: the model; its trainable parameters change. To go on it must hold the weights of
            :func:`kifmerge.training.resumable.newest_step`.
        examples: the new task's rows.
        memory: rows of earlier tasks for the outer steps; empty: plain training.
        options: optimization.
        variant: options of the recurrent loop; or plain training as KIF wants it, which leaves
            the task's scores in the state of its last step; None: plain training.
        seed: of row order, dropout and memory batches.
        folders: where checkpoints are kept and found.
        on_progress: told after each optimizer step.
    """
    kif = variant if isinstance(variant, KifTraining) else None
    recurrent = variant.recurrent if isinstance(variant, KifTraining) else variant
    rows = training_features(loaded, examples)
    outer_rows = training_features(loaded, memory) if recurrent is not None else []
    watcher = _Watcher(on_progress)
    identity = {
        "training": asdict(options),
        "recurrent": asdict(recurrent) if recurrent is not None else None,
        "seed": seed,
        "rows": len(rows),
        "memory_rows": len(outer_rows),
        "kif": kif.identity() if kif is not None else None,
    }
    trainer = KifTrainer(
        loaded=loaded,
        step_dir=folders.steps,
        identity=identity,
        args=training_arguments(options, seed=seed, output_dir=str(folders.steps)),
        train_dataset=rows,
        data_collator=collator(loaded),
        callbacks=[watcher],
        memory=outer_rows,
        recurrent=recurrent,
    )
    trainer.remove_callback(PrinterCallback)
    watcher.trainer = trainer
    if kif is not None:
        trainer.use_kif(kif)
    if loaded.options.kind != "causal-lm":
        # These losses are means whatever the Trainer passes on, so that it must average
        # accumulated micro-batches itself.
        trainer.model_accepts_loss_kwargs = False
    newest = newest_step(folders.steps)
    if newest is None and folders.optimizer is not None:
        trainer.add_callback(_GivenOptimizer(trainer, folders.optimizer))
    if newest is None or not _is_last(newest / STATE, identity):
        trainer.train(resume_from_checkpoint=str(newest / STATE) if newest is not None else None)
        newest = newest_step(folders.steps)
    assert newest is not None
    return _record(newest / STATE)


def _is_last(state_dir: Path, identity: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train after a state."""
    content = read_state(state_dir, identity)
    return bool(content["step"] >= content["total_steps"])


def _record(state_dir: Path) -> TrainingRecord:
    """What the whole training did, interruptions included, from the state of its last step."""
    content = read_details(state_dir / STATE_FILE)
    rounds = [Round(**done) for done in read_details(state_dir / STATE_COUNTERS).get("rounds", [])]
    history = read_details(state_dir / TRAINER_FILE)["log_history"]
    return TrainingRecord(
        num_steps=content["step"],
        num_outer_steps=sum(done.outer_steps for done in rounds),
        num_nonfinite_steps=content["num_nonfinite_steps"],
        train_seconds=content["seconds"],
        losses=[entry["loss"] for entry in history if "loss" in entry],
        rounds=rounds,
    )


class _GivenOptimizer(TrainerCallback):
    """Gives the optimizer, once the Trainer has made it, what an earlier task's left."""

    def __init__(self, trainer: KifTrainer, directory: Path) -> None:
        self._trainer = trainer
        self._directory = directory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        begin_with_optimizer(self._trainer, self._directory)


def training_arguments(
    options: TrainingOptions, *, seed: int, output_dir: str
) -> TrainingArguments:
    """Translate the options; nothing is reported by the Trainer itself."""
    return TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        optim=options.optimizer,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        use_cpu=options.device == "cpu",
        seed=seed,
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        log_level="error",
    )


def refuse_process_group() -> None:
    """Raise RunError under torchrun: every process would write the same folders.

    The loop itself runs in process groups, in a script of one's own.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise RunError(
            f"found {num_processes} processes: this command runs in one. Under torchrun use "
            "RecurrentMixin in a training script of your own"
        )


def training_device(options: TrainingOptions) -> torch.device:
    """Where the Trainer will put the model: the accelerator if there is one and it is wanted."""
    accelerator = torch.accelerator.current_accelerator()
    if options.device == "cpu" or accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return accelerator


class _Watcher(TrainerCallback):
    """Tells of each step."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.trainer: KifTrainer | None = None
        self._on_progress = on_progress
        self._loss: float | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        num_rounds = len(self.trainer.rounds) if self.trainer is not None else 0
        self._on_progress(Progress(state.global_step, state.max_steps, num_rounds, self._loss))
