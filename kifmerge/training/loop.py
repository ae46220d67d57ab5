"""The outer half of the recurrent loop: memory batches, outer steps, fusion, state on disk."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer

from kifmerge.checkpoint.atomic import whole_file, write_json
from kifmerge.checkpoint.gathering import KeptTensors, write_parts
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.fusion.fuse import Role
from kifmerge.models.gathered import parts_as_named
from kifmerge.models.parameters import trained_parameters
from kifmerge.tensor.sharding import part_like, sharded_like
from kifmerge.training.guard import GradientGuard
from kifmerge.training.importance import require_gradients
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.recurrent import RecurrentRounds, Round

STATE_TENSORS = "recurrent.safetensors"
STATE_COUNTERS = "recurrent.json"
_STATE_STEM = Path(STATE_TENSORS).stem


class Memory(Protocol):
    """Rows of earlier tasks, prepared like the training rows: anything indexable with a length."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One row, as the data collator takes it."""
        ...


class MemoryBatches:
    """Row numbers of each outer step's batch: drawn afresh, without replacement within a batch.

    A batch depends on the seed and the number of the outer step alone, so that a resumed run and
    every process draw the same.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._seed = seed

    def __getitem__(self, outer_step: int) -> list[int]:
        """Row numbers of the given outer step, counted from 0 over the whole training."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + outer_step)
        order = torch.randperm(self._num_rows, generator=generator)
        chosen: list[int] = order[: self._batch_size].tolist()
        return chosen


def share_of_rank(rows: Sequence[int], rank: int, num_ranks: int) -> list[int]:
    """Rows of one process; every process gets as many, from the start again where they run out.

    >>> [share_of_rank([7, 3, 5], rank, 2) for rank in range(2)]
    [[7, 5], [3, 7]]
    """
    num_rows = -(-len(rows) // num_ranks)
    return [rows[(rank + i * num_ranks) % len(rows)] for i in range(num_rows)]


class RecurrentLoop:
    """Drives the rounds with the Trainer's own training step, clipping and optimizer.

    In a process group every process makes every step, on its share of the rows, and gradients are
    averaged as in any training step. Where each holds the whole model (DDP) all find the same
    importance, masks and weights without further talk; where each holds a part of every parameter
    (FSDP2) they count together, see :class:`kifmerge.training.recurrent.RecurrentRounds`.

    Args:
        trainer: whose loop it is.
        memory: rows of earlier tasks.
        options: of the loop.
        guard: that every step has to pass.
        memory_batches: row numbers of each outer step; drawn at random if left out.
        fuses: whether rounds are fused here, or elsewhere: then no copy of the weights is kept.

    Attributes:
        options: of the loop.
        done: what each round did.
        inner_steps: of the round that is under way.
        is_settled: whether the weights are fused, or final: what may be saved and evaluated.
        resume_from: checkpoint to go on from when training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        memory: Memory,
        options: RecurrentOptions,
        guard: GradientGuard,
        memory_batches: Sequence[list[int]] | MemoryBatches | None = None,
        *,
        fuses: bool = True,
    ) -> None:
        self.options = options
        self.done: list[Round] = []
        self.inner_steps = 0
        self.is_settled = True
        self.resume_from: Path | None = None
        self._trainer = trainer
        self._memory = memory
        self._guard = guard
        self._given_batches = memory_batches
        self._fuses = fuses
        self._batches: Sequence[list[int]] | MemoryBatches = []
        self._num_outer_steps = 0
        self._step_is_good = True
        self._parameters: dict[str, nn.Parameter] = {}
        self._rounds: RecurrentRounds | None = None
        self._outer_optimizer: torch.optim.Optimizer | None = None

    def _random_batches(self) -> MemoryBatches:
        trainer = self._trainer
        inner_batch_size = trainer.get_total_train_batch_size(trainer.args)
        return MemoryBatches(
            len(self._memory),
            self.options.outer_batch_size or inner_batch_size,
            trainer.args.seed,
        )

    @property
    def rounds(self) -> RecurrentRounds:
        """The rounds; there are some once training has begun."""
        assert self._rounds is not None
        return self._rounds

    def begin(self) -> None:
        """Take theta_b from the model, which is on its device now, or go on from a checkpoint."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._parameters = trained_parameters(model)
        self._rounds = RecurrentRounds(
            self._parameters, self.options, model=model, fuses=self._fuses
        )
        given = self._given_batches
        self._batches = self._random_batches() if given is None else given
        self.inner_steps, self.is_settled, self._num_outer_steps = 0, True, 0
        self.done.clear()
        if self.options.outer_optimizer == "separate":
            self._outer_optimizer = self._separate_optimizer()
        if self.resume_from is not None:
            self._load(self.resume_from)

    def _separate_optimizer(self) -> torch.optim.Optimizer:
        args = self._trainer.args
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        settings["lr"] = self.options.outer_learning_rate
        optimizer: torch.optim.Optimizer = optimizer_class(self._parameters.values(), **settings)
        return optimizer

    def before_step(self, role: Role) -> None:
        """Check the clipped gradients; a step with a non-finite one is left out altogether."""
        gradients = [parameter.grad for parameter in self._parameters.values()]
        if self._num_outer_steps == 0:
            require_gradients(gradients)
        step = (
            f"optimizer step {self._trainer.state.global_step + 1}"
            if role == "new"
            else f"outer step {self._num_outer_steps + 1}"
        )
        scaled = self._trainer.accelerator.scaler is not None
        self._step_is_good = self._guard.admits(self._parameters, step, scaled=scaled)
        if self._step_is_good and self.options.weights == "before":
            self.rounds.observe(role)

    def after_step(self, role: Role) -> None:
        """Observe the stepped weights with the gradient that moved them."""
        if self._step_is_good and self.options.weights == "after":
            self.rounds.observe(role)

    def count_inner_step(self) -> None:
        """One inner step is over: until the round ends the weights are not fused."""
        self.inner_steps += 1
        self.is_settled = False

    def finish_tail(self) -> None:
        """Treat the last steps, which fill no round, as the options say."""
        if self.inner_steps and self.options.tail == "fuse":
            self.finish_round()
        self.is_settled = True

    def finish_round(self) -> None:
        """Make the outer steps on memory and fuse."""
        self.rounds.begin_outer()
        losses = self.make_outer_steps(self.options.outer_steps)
        with _warnings_from(self._trainer.is_world_process_zero()):
            done = self.rounds.fuse(
                inner_steps=self.inner_steps,
                outer_steps=len(losses),
                outer_loss=float(torch.stack(losses).mean()),
            )
        self.done.append(done)
        self.inner_steps, self.is_settled = 0, True

    def _leave_half_step(self) -> None:
        """Let go of an accumulation that a stop cut short: outer steps are whole steps.

        Its gradients are each process's own, and the optimizer would not step.
        """
        self._trainer.model_wrapped.zero_grad()
        self._trainer.accelerator.gradient_state._set_sync_gradients(True)

    def make_outer_steps(self, num_steps: int) -> list[Tensor]:
        """Make optimizer steps on memory; their losses, each the mean over processes."""
        self._leave_half_step()
        losses = [self._outer_step() for _ in range(num_steps)]
        return list(self._trainer.accelerator.reduce(torch.stack(losses), "mean"))

    def _outer_step(self) -> Tensor:
        trainer = self._trainer
        loss = self._backward(self._next_batch())
        self._clip()
        self.before_step("historical")
        if self._outer_optimizer is None:
            assert trainer.optimizer is not None
            trainer.optimizer.step()
        else:
            self._step_separately(self._outer_optimizer)
        self.after_step("historical")
        trainer.model_wrapped.zero_grad()
        self._num_outer_steps += 1
        return loss

    def _clip(self) -> None:
        """Clip as the Trainer does; without a maximum, only undo a gradient scaler's scale."""
        trainer = self._trainer
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(trainer.model_wrapped)
        else:
            trainer._get_grad_norm(trainer.model_wrapped)

    def _next_batch(self) -> Any:
        trainer = self._trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "memory")
        try:
            rows = self._batches[self._num_outer_steps]
        except IndexError:
            raise TrainingError(
                f"memory_batches holds {self._num_outer_steps} batches: "
                f"outer step {self._num_outer_steps + 1} needs another"
            ) from None
        own = share_of_rank(rows, trainer.args.process_index, trainer.args.world_size)
        return collate([self._memory[row] for row in own])

    def _backward(self, batch: Any) -> Tensor:
        """Forward and backward of one memory batch, with the loss weighted as the options say."""
        trainer = self._trainer
        accumulation = trainer.args.gradient_accumulation_steps
        divisor = accumulation if self.options.outer_loss == "divided" else 1
        num_items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        inner_divisor = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = divisor
        try:
            with _unlogged(trainer):
                loss = trainer.training_step(
                    trainer.model_wrapped, batch, None if num_items is None else num_items * divisor
                )
        finally:
            trainer.current_gradient_accumulation_steps = inner_divisor
        return loss.detach() * divisor

    def _step_separately(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the separate optimizer on gradients that clipping has already unscaled."""
        if self._step_is_good:
            optimizer.step()
        scaler = self._trainer.accelerator.scaler
        if scaler is not None:
            scaler.update()

    def save(self, directory: Path) -> None:
        """Write accumulators, counters and the separate optimizer beside the Trainer's state.

        All processes of a sharded model call it together.
        """
        ranks = self.rounds.holders
        tensors = {**self.rounds.state_dict(), **_optimizer_tensors(self._outer_optimizer)}
        if ranks.size > 1:
            write_parts(directory, _STATE_STEM, parts_as_named(tensors), ranks)
        else:
            with whole_file(directory / STATE_TENSORS) as temporary:
                safetensors.torch.save_file(tensors, temporary)
        if not ranks.is_first:
            return
        counters = {
            **self.rounds.counters(),
            "num_outer_steps": self._num_outer_steps,
            "num_nonfinite_steps": self._guard.num_skipped,
            "rounds": [done.as_dict() for done in self.done],
            "options": self._recorded_options(),
        }
        write_json(directory / STATE_COUNTERS, counters)

    def _recorded_options(self) -> Any:
        """The options as JSON gives them back."""
        return json.loads(json.dumps(asdict(self.options)))

    def _load(self, directory: Path) -> None:
        try:
            tensors = KeptTensors(directory, _STATE_STEM)
            counters = json.loads((directory / STATE_COUNTERS).read_text(encoding="utf-8"))
            if counters["options"] != self._recorded_options():
                raise ValueError("it was saved under other recurrent options")
            of_optimizer = {k for k in tensors if k.startswith(_OPTIMIZER_PREFIX)}
            if self._outer_optimizer is not None:
                _restore_optimizer(self._outer_optimizer, {k: tensors[k] for k in of_optimizer})
            self.rounds.load_state(tensors.without(of_optimizer), counters)
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            raise CheckpointError(
                f"{directory} does not hold this run's recurrent state ({error}): "
                "resume from a checkpoint that the recurrent loop saved, or start over"
            ) from error
        self._num_outer_steps = counters["num_outer_steps"]
        self._guard.num_skipped = counters["num_nonfinite_steps"]
        self.done.extend(Round(**done) for done in counters["rounds"])


@contextmanager
def _unlogged(trainer: Trainer) -> Iterator[None]:
    """Keep memory batches out of what some Trainers (TRL's) note for their logs in the loss."""
    noted = {
        n: getattr(trainer, n) for n in ("_metrics", "_total_train_tokens") if hasattr(trainer, n)
    }
    for name, value in noted.items():
        setattr(trainer, name, copy.deepcopy(value))
    try:
        yield
    finally:
        for name, value in noted.items():
            setattr(trainer, name, value)


@contextmanager
def _warnings_from(speaks: bool) -> Iterator[None]:
    """One process speaks for all: the others know the same and say nothing."""
    if speaks:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_OPTIMIZER_PREFIX = "outer_optimizer/"


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """State of an optimizer as ``outer_optimizer/PARAMETER_NUMBER/KEY``."""
    if optimizer is None:
        return {}
    return {
        f"{_OPTIMIZER_PREFIX}{number}/{key}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        number, _, key = name.removeprefix(_OPTIMIZER_PREFIX).partition("/")
        of = parameters[int(number)]
        is_like = value.shape == of.shape
        state.setdefault(int(number), {})[key] = (
            sharded_like(part_like(value, of), of) if is_like else value
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
