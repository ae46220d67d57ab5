"""Training on one task: plain, or with the recurrent loop over a memory of earlier ones."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

from kifmerge.errors import check_at_least
from kifmerge.phases.data import Example
from kifmerge.phases.encode import collator, training_features
from kifmerge.phases.model import LoadedModel
from kifmerge.phases.presets import RecurrentOptions
from kifmerge.phases.recurrent import Round
from kifmerge.phases.trainer import RecurrentTrainer


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
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and names that transformers does not know."""
        check_at_least(
            self, max_steps=1, batch_size=1, accumulation=1, warmup_steps=0,
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


def train_task(
    loaded: LoadedModel,
    examples: Sequence[Example],
    memory: Sequence[Example],
    options: TrainingOptions,
    recurrent: RecurrentOptions | None,
    *,
    seed: int,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainingRecord:
    """Train a model in place on the rows of one task.

    Args:
        loaded: the model; its trainable parameters change.
        examples: the new task's rows.
        memory: rows of earlier tasks for the outer steps; empty: plain training.
        options: optimization.
        recurrent: of the loop; None: plain training.
        seed: of row order, dropout and memory batches.
        on_progress: told after each optimizer step.
    """
    rows = training_features(loaded, examples)
    outer_rows = training_features(loaded, memory) if recurrent is not None else []
    watcher = _Watcher(on_progress)
    with tempfile.TemporaryDirectory(prefix="kifmerge-") as scratch_dir:
        trainer = RecurrentTrainer(
            model=loaded.model,
            args=training_arguments(options, seed=seed, output_dir=scratch_dir),
            train_dataset=rows,
            data_collator=collator(loaded),
            callbacks=[watcher],
            memory=outer_rows,
            recurrent=recurrent,
        )
        trainer.remove_callback(PrinterCallback)
        watcher.trainer = trainer
        if loaded.options.kind != "causal-lm":
            # These losses are means whatever the Trainer passes on, so that it must average
            # accumulated micro-batches itself.
            trainer.model_accepts_loss_kwargs = False
        output = trainer.train()
    return TrainingRecord(
        num_steps=output.global_step,
        num_outer_steps=sum(done.outer_steps for done in trainer.rounds),
        num_nonfinite_steps=trainer.num_nonfinite_steps,
        train_seconds=output.metrics["train_runtime"],
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        rounds=trainer.rounds,
    )


def training_arguments(
    options: TrainingOptions, *, seed: int, output_dir: str
) -> TrainingArguments:
    """Translate the options; nothing is saved or reported by the Trainer itself."""
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
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        log_level="error",
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
        self.trainer: RecurrentTrainer | None = None
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
