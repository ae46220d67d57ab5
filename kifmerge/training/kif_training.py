"""What KIF asks of training: scores of the whole task, the orthogonality term, frozen elements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kifmerge.checkpoint.atomic import whole_file, write_json
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.models.parameters import trained_parameters
from kifmerge.tensor.importance import ImportanceAccumulator
from kifmerge.tensor.kif import orthogonality_penalty
from kifmerge.tensor.units import lora_factor
from kifmerge.training.guard import GradientGuard
from kifmerge.training.importance import require_gradients
from kifmerge.training.presets import KifOptions, RecurrentOptions
from kifmerge.training.resumable import ResumableTrainer
from kifmerge.training.threads import training_workers

STATE_TENSORS = "scores.safetensors"
STATE_COUNTERS = "scores.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KifTraining:
    """Plain training as KIF wants it: of a task, or of KIF-M's pass over memory.

    Attributes:
        kif: options of KIF.
        recurrent: says what plain training does about micro-batches and non-finite gradients.
        trained: of a pass over memory: for each parameter, by name, True where an element may
            change. None: a task, all of which trains and is scored.
    """

    kif: KifOptions
    recurrent: RecurrentOptions
    trained: Mapping[str, Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same where an interrupted training goes on."""
        if self.trained is None:
            return asdict(self.kif)
        return {**asdict(self.kif), "num_trained": sum(int(m.sum()) for m in self.trained.values())}


class TaskScores(TrainerCallback):
    """Accumulates the importance of a task over its optimizer steps, the very first left out.

    Attributes:
        options: of KIF.
        resume_from: state to go on from when training begins.
    """

    def __init__(self, trainer: Trainer, guard: GradientGuard, options: KifOptions) -> None:
        self.resume_from: Path | None = None
        self._trainer = trainer
        self._guard = guard
        self.options = options
        self._num_refused = 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._accumulator: ImportanceAccumulator | None = None

    @property
    def accumulator(self) -> ImportanceAccumulator:
        """The accumulator; there is one once training has begun."""
        assert self._accumulator is not None
        return self._accumulator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set up the accumulators, on the device where the parameters are."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        self._parameters = trained_parameters(model)
        self._accumulator = ImportanceAccumulator(self._parameters, self.options.importance)
        self._num_refused = self._guard.num_skipped
        if self.resume_from is not None:
            self._load(self.resume_from)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the stepped weights with the gradients that moved them."""
        is_refused = self._guard.num_skipped > self._num_refused
        self._num_refused = self._guard.num_skipped
        is_left_out = state.global_step == 0 and self.options.first_step == "left-out"
        if is_refused or is_left_out:
            return
        gradients = [parameter.grad for parameter in self._parameters.values()]
        if self.accumulator.num_steps == 0:
            require_gradients(gradients)
        live = list(self._parameters.values())
        with training_workers(live) as workers:
            self.accumulator.accumulate(live, gradients, spread=workers.map)

    def save(self, directory: Path) -> None:
        """Write the accumulators beside the Trainer's state."""
        with whole_file(directory / STATE_TENSORS) as temporary:
            safetensors.torch.save_file(self.accumulator.state_dict(), temporary)
        write_json(directory / STATE_COUNTERS, {"num_steps": self.accumulator.num_steps})

    def _load(self, directory: Path) -> None:
        kept, num_steps = read_task_scores(directory)
        expected = {key: value.shape for key, value in self.accumulator.state_dict().items()}
        found = {key: value.shape for key, value in kept.items()}
        differing = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        if differing:
            raise CheckpointError(
                f"{directory / STATE_TENSORS} holds the scores of other parameters, first at "
                f"{differing[0]}: start the task over"
            )
        self.accumulator.load_state_dict(kept, num_steps=num_steps)


def read_task_scores(directory: Path) -> tuple[dict[str, Tensor], int]:
    """What :meth:`TaskScores.save` wrote: float32 accumulators by the live names, and steps taken.

    Raises:
        CheckpointError: not there, or damaged.
    """
    try:
        tensors = safetensors.torch.load_file(directory / STATE_TENSORS)
        counters = json.loads((directory / STATE_COUNTERS).read_text(encoding="utf-8"))
        return {n: value.float() for n, value in tensors.items()}, int(counters["num_steps"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{directory} does not hold the scores of the task so far ({error}): start it over"
        ) from error


class FrozenElements(TrainerCallback):
    """Keeps some elements of the parameters as they are, bit for bit, whatever the optimizer.

    Their gradients are taken away, so that they count neither in clipping nor in the optimizer's
    state, and what a step does to them all the same (weight decay, a sign, a shared
    normalisation) is undone.

    Args:
        trainer: in whose training they are kept.
        trained: for each parameter, by name, True where an element may change.
    """

    def __init__(self, trainer: Trainer, trained: Mapping[str, Tensor]) -> None:
        self._trainer = trainer
        self._trained = dict(trained)
        self._parameters: dict[str, nn.Parameter] = {}
        self._kept: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the elements; a training that is resumed has not changed them yet."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        self._parameters = trained_parameters(model)
        self._trained = {n: self._trained[n].to(p.device) for n, p in self._parameters.items()}
        self._kept = {n: p.detach().clone() for n, p in self._parameters.items()}

    def clear_gradients(self) -> None:
        """Take away the gradients of the frozen elements, before they are clipped."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                # Not multiplied: a frozen element's NaN is no concern of this training.
                parameter.grad.masked_fill_(~self._trained[name], 0.0)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what the step did to them."""
        for name, parameter in self._parameters.items():
            parameter.copy_(torch.where(self._trained[name], parameter, self._kept[name]))


class KifMixin:
    """Gives a resumable Trainer what KIF asks of training.

    Attributes:
        guard: that the Trainer's steps have to pass.
        task_scores: of the task, if it is scored for KIF.
    """

    guard: GradientGuard
    task_scores: TaskScores | None = None
    _orthogonality = 0.0
    _frozen: FrozenElements | None = None

    def use_kif(self, training: KifTraining) -> None:
        """Score the task to be trained, or freeze what a pass over memory leaves as it is."""
        if training.trained is None:
            self.score_task(training.kif)
        else:
            self.freeze_others(training.trained)

    def score_task(self, options: KifOptions) -> None:
        """Score the task to be trained, and train it with the orthogonality term.

        Raises:
            TrainingError: the term is asked for, and the model has no LoRA adapter.
        """
        trainer = _as_trainer(self)
        self.task_scores = TaskScores(trainer, self.guard, options)
        trainer.add_callback(self.task_scores)
        self._orthogonality = options.orthogonality_weight
        if self._orthogonality and not self._lora_factors():
            raise TrainingError(
                "the orthogonality term keeps LoRA ranks apart, and this model trains no LoRA "
                "adapter: set kif.orthogonality to 0, or give the model one"
            )

    def freeze_others(self, trained: Mapping[str, Tensor]) -> None:
        """Train only the elements marked True: see :class:`FrozenElements`."""
        trainer = _as_trainer(self)
        self._frozen = FrozenElements(trainer, trained)
        trainer.add_callback(self._frozen)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Make the forward and backward pass of a micro-batch, and of the term with the last."""
        trainer = _as_trainer(self)
        loss: Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        if trainer.accelerator.sync_gradients:
            # Once per optimizer step, however its micro-batches are weighted.
            if self._orthogonality:
                term = self._orthogonality * self._penalty()
                trainer.accelerator.backward(term)
                loss = loss + term.detach()
            if self._frozen is not None:
                self._frozen.clear_gradients()
        return loss

    def _penalty(self) -> Tensor:
        factors = self._lora_factors()
        # Those of a convolution have further axes.
        return orthogonality_penalty(
            [value.flatten(1) for side, value in factors if side == "A"],
            [value.flatten(1) for side, value in factors if side == "B"],
        )

    def _lora_factors(self) -> list[tuple[str, nn.Parameter]]:
        """Side and parameter of each trained LoRA factor."""
        trainer = _as_trainer(self)
        model = trainer.accelerator.unwrap_model(trainer.model)
        named = [(lora_factor(n), p) for n, p in trained_parameters(model).items()]
        return [(factor.side, parameter) for factor, parameter in named if factor is not None]

    def write_state(self, directory: Path, **figures: Any) -> None:
        """Write the state of this moment, the task's scores with it."""
        super().write_state(directory, **figures)  # type: ignore[misc]
        if self.task_scores is not None:
            self.task_scores.save(directory)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.task_scores is not None:
            self.task_scores.resume_from = Path(checkpoint) if checkpoint else None


class KifTrainer(KifMixin, ResumableTrainer):
    """A recurrent Trainer with checkpoints of ours that can also train a task of KIF."""


def _as_trainer(mixin: KifMixin) -> Trainer:
    assert isinstance(mixin, Trainer)
    return mixin
