"""Inner and outer steps as phases of their own: what ``kifmerge train`` and ``replay`` do.

A shell script of train, replay and merge, round after round, gives the weights of the in-process
loop, bit for bit: every phase goes on from the state that the one before it left, and the weights
it finds. Each writes one folder, which appears only when it is whole:

    OUT/             the checkpoint, or the adapter
    OUT/importance/  snapshot of the new (train) or the historical (replay) side
    OUT/state/       what the next phase goes on from
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers import Trainer as StockTrainer
from transformers import TrainingArguments as Arguments

from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.units import Units
from kifmerge.errors import TrainingError
from kifmerge.fusion.fuse import Role
from kifmerge.models.data import Example
from kifmerge.models.encode import collator, training_features
from kifmerge.models.model import LoadedModel
from kifmerge.training.guard import GradientGuard
from kifmerge.training.importance import refuse_without_gradients, write_accumulator
from kifmerge.training.kif import important_elements
from kifmerge.training.kif_training import KifMixin, KifTraining
from kifmerge.training.loop import RecurrentLoop
from kifmerge.training.presets import KifOptions, RecurrentOptions
from kifmerge.training.resumable import STATE, ResumableMixin, newest_step
from kifmerge.training.state import STATE_FILE
from kifmerge.training.train import Progress, TrainingOptions, training_arguments

IMPORTANCE = "importance"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOptions:
    """What both phases are run with.

    Attributes:
        training: optimization; the whole task's, of which a phase makes some steps.
        recurrent: of the loop that the phases make up.
        seed: of row order, dropout and memory batches.
        data: digest of the new task's rows; a state of other rows is refused.
        state_dir: to go on from; None begins a task.
        step_dir: keeps the latest checkpoint while a long phase is under way.
        made_by: recorded in what is written.
        kif: scores the whole task for KIF; None scores a round's steps for the recurrent loop.
        only_units: trains only those important to earlier tasks, with the fraction of ``kif``.
    """

    training: TrainingOptions
    recurrent: RecurrentOptions
    seed: int
    data: str | None
    state_dir: Path | None
    step_dir: Path
    made_by: Mapping[str, Any]
    kif: KifOptions | None = None
    only_units: Units | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same in all phases of one task."""
        return {
            "training": asdict(self.training),
            "recurrent": asdict(self.recurrent),
            "seed": self.seed,
            "data": self.data,
            "kif": None if self.kif is None else asdict(self.kif),
            "only_units": self.made_by["parents"].get("units"),
        }

    @property
    def scored(self) -> RecurrentOptions:
        """The loop's options under a rule that scores, whatever is done with the snapshots.

        A task that is scored for KIF needs nothing of the loop.
        """
        if self.kif is not None and self.only_units is None:
            return replace(self.recurrent, rule="none")
        if self.recurrent.rule in ("average", "none"):
            return replace(self.recurrent, rule="recurrent-kif")
        return self.recurrent


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """What a phase did: ``step`` of ``total_steps`` is where the task stands after it."""

    step: int
    total_steps: int
    num_steps: int
    num_nonfinite_steps: int
    loss: float | None


def kept_record(out_dir: Path) -> PhaseRecord:
    """What the phase did that made a folder."""
    return PhaseRecord(**read_details(out_dir / STATE / STATE_FILE)["record"])


def train_steps(
    loaded: LoadedModel,
    examples: Sequence[Example],
    options: PhaseOptions,
    out_dir: Path,
    *,
    num_steps: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> PhaseRecord:
    """Make inner steps on the new task and write checkpoint, snapshot and state.

    Args:
        loaded: the model, changed in place.
        examples: all rows of the new task: the state knows where among them it stands.
        options: see there.
        out_dir: existing folder to write into.
        num_steps: optimizer steps to make; None: all that are left of the task.
        on_progress: told after each step.

    Raises:
        CheckpointError: a state of another training, or a damaged one.
        TrainingError: no step is left.
    """
    trainer = PhaseTrainer(loaded, examples, options)
    trainer.add_callback(_InnerSteps(trainer, out_dir, num_steps, on_progress))
    interrupted = newest_step(options.step_dir)
    state_dir = interrupted / STATE if interrupted is not None else options.state_dir
    trainer.train(None if state_dir is None else str(state_dir))
    return kept_record(out_dir)


def replay_steps(
    loaded: LoadedModel,
    memory: Sequence[Example],
    options: PhaseOptions,
    out_dir: Path,
    *,
    num_steps: int,
    total_steps: int,
) -> PhaseRecord:
    """Make outer steps on memory and write checkpoint, snapshot and state; see train_steps.

    Args:
        loaded: the model after the inner steps, changed in place.
        memory: rows of earlier tasks.
        options: see there.
        out_dir: existing folder to write into.
        num_steps: outer steps to make.
        total_steps: inner steps of the whole task, which the learning rate's schedule follows.
    """
    training = replace(options.training, max_steps=total_steps)
    trainer = PhaseTrainer(loaded, memory, options, training)
    trainer.add_callback(_OuterSteps(trainer, out_dir, num_steps, options.state_dir))
    with contextlib.suppress(_Finished):
        trainer.train(None if options.state_dir is None else str(options.state_dir))
    return kept_record(out_dir)


class PhaseTrainer(KifMixin, ResumableMixin, StockTrainer):
    """A stock Trainer with the parts of the recurrent loop and of KIF, but nothing to join them."""

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        options: PhaseOptions,
        training: TrainingOptions | None = None,
    ) -> None:
        rows = training_features(loaded, examples)
        super().__init__(
            loaded.model,
            training_arguments(
                training or options.training, seed=options.seed, output_dir=str(options.step_dir)
            ),
            train_dataset=rows,
            data_collator=collator(loaded),
        )
        self.remove_callback(PrinterCallback)
        refuse_without_gradients(self.args)
        if loaded.options.kind != "causal-lm" or (
            options.recurrent.accumulated_loss == "micro-batch"
        ):
            self.model_accepts_loss_kwargs = False
        self.loaded = loaded
        self.options = options
        self.identity = options.identity()
        self.step_dir = options.step_dir
        self.guard = GradientGuard(options.recurrent.nonfinite)
        self.loop = RecurrentLoop(self, rows, options.scored, self.guard, fuses=False)
        if options.kif is not None:
            self._use_kif(options.kif, options.only_units)
        self.last_loss: float | None = None

    def _use_kif(self, kif: KifOptions, only_units: Units | None) -> None:
        marks = None
        if only_units is not None:
            marks = important_elements(self.loaded.model, only_units, kif.important_fraction)
        self.use_kif(KifTraining(kif=kif, recurrent=self.options.recurrent, trained=marks))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.phase_loop.resume_from = Path(checkpoint) if checkpoint else None

    @property
    def phase_loop(self) -> RecurrentLoop:
        """The loop; a phase always has one."""
        assert self.loop is not None
        return self.loop

    def write(self, directory: Path, role: Role, record: PhaseRecord) -> None:
        """Write checkpoint, snapshot and state of this moment."""
        self.loaded.save(directory, self.options.made_by)
        scores = self.task_scores
        write_accumulator(
            directory / IMPORTANCE,
            self.phase_loop.rounds.accumulators[role] if scores is None else scores.accumulator,
            self.loaded.model,
            {
                "role": role,
                "made_by": self.options.made_by,
                **({} if scores is None else {"first_step": scores.options.first_step}),
            },
        )
        (directory / STATE).mkdir()
        self.write_state(directory / STATE, last_phase=role, record=asdict(record))

    def begin_outer_steps(self, state_dir: Path | None) -> None:
        """Set what the Trainer's own loop would set before its first batch."""
        self.current_gradient_accumulation_steps = 1
        self._load_rng_state(None if state_dir is None else str(state_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, and remember the loss."""
        self.last_loss = logs.get("loss", self.last_loss)
        super().log(logs, start_time)


class _InnerSteps(TrainerCallback):
    """Watches the Trainer's own steps, ends them after the given number, and writes."""

    def __init__(
        self,
        trainer: PhaseTrainer,
        out_dir: Path,
        num_steps: int | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._trainer = trainer
        self._out_dir = out_dir
        self._num_steps = math.inf if num_steps is None else num_steps
        self._on_progress = on_progress
        self._last_step = math.inf

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise TrainingError(
                f"no step is left: the state stands at step {state.global_step} of "
                f"{state.max_steps}. The task is learnt: go on with the next, without this state"
            )
        trainer = self._trainer
        trainer.phase_loop.begin()
        begins_round = trainer.last_phase == "historical"
        if begins_round:
            trainer.phase_loop.rounds.empty_scores()
        self._last_step = min(state.max_steps, trainer.first_step + self._num_steps)

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.phase_loop.before_step("new")

    def on_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.phase_loop.after_step("new")

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        self._on_progress(Progress(state.global_step, int(self._last_step), 0, trainer.last_loss))
        if state.global_step >= self._last_step:
            num_steps = state.global_step - trainer.first_step
            trainer.write(self._out_dir, "new", _record(trainer, num_steps, trainer.last_loss))
            control.should_training_stop = True
            control.should_save = False


class _Finished(Exception):  # noqa: N818 - it is none
    """The outer steps are made: there is nothing for the Trainer's own loop to do."""


class _OuterSteps(TrainerCallback):
    """Makes outer steps once the Trainer has prepared model and optimizer, and writes."""

    def __init__(
        self, trainer: PhaseTrainer, out_dir: Path, num_steps: int, state_dir: Path | None
    ) -> None:
        self._trainer = trainer
        self._out_dir = out_dir
        self._num_steps = num_steps
        self._state_dir = state_dir

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        trainer.phase_loop.begin()
        trainer.begin_outer_steps(self._state_dir)
        losses = trainer.phase_loop.make_outer_steps(self._num_steps)
        loss = float(torch.stack(losses).mean())
        trainer.write(self._out_dir, "historical", _record(trainer, self._num_steps, loss))
        raise _Finished


def _record(trainer: PhaseTrainer, num_steps: int, loss: float | None) -> PhaseRecord:
    return PhaseRecord(
        step=trainer.state.global_step,
        total_steps=trainer.state.max_steps,
        num_steps=num_steps,
        num_nonfinite_steps=trainer.guard.num_skipped,
        loss=loss,
    )
