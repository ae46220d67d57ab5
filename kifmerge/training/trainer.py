"""The recurrent loop inside a stock ``transformers.Trainer``: one mixin.

    class RecurrentTrainer(RecurrentMixin, Trainer): ...
    RecurrentTrainer(model, args, train_dataset=new, memory=old).train()

The Trainer keeps what is its own: batches, accumulation, clipping, mixed precision, schedule. The
mixin watches the inner steps through callbacks, makes the outer steps on memory after every Q-th of
them, and fuses. Saving and evaluating wait for the end of the round, so that what is saved and
measured is always fused; at the last step they follow the tail.

A Trainer that prepares its own datasets (TRL's SFTTrainer) prepares the memory in the same way:

    class RecurrentSFTTrainer(RecurrentMixin, SFTTrainer): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kifmerge.errors import TrainingError
from kifmerge.models.parameters import trained_parameters
from kifmerge.training.guard import GradientGuard
from kifmerge.training.importance import refuse_without_gradients
from kifmerge.training.loop import Memory, MemoryBatches, RecurrentLoop
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.recurrent import Round


class RecurrentMixin:
    """Gives a ``transformers.Trainer`` (or a subclass of it) the recurrent loop.

    Args:
        memory: rows of earlier tasks, in the form of ``train_dataset``. None or empty makes this
            plain training: the first task.
        recurrent: options of the loop; the default preset if left out.
        memory_batches: row numbers per outer step; drawn at random with ``args.seed`` if left out.

    Raises:
        TrainingError: an engine or optimizer that leaves no gradients (DeepSpeed, LOMO, layerwise)
            or divides the model otherwise than FSDP2 does (FSDP1, tensor parallelism).
    """

    _preparation: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __init__(
        self,
        *args: Any,
        memory: Memory | None = None,
        recurrent: RecurrentOptions | None = None,
        memory_batches: Sequence[list[int]] | MemoryBatches | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recurrent = recurrent or RecurrentOptions()
        self.loop: RecurrentLoop | None = None
        trainer = _as_trainer(self)
        refuse_without_gradients(trainer.args)
        refuse_sharded(trainer)
        self.memory = self._prepared(_indexable(memory))
        if self.recurrent.accumulated_loss == "micro-batch":
            trainer.model_accepts_loss_kwargs = False
        self.guard = GradientGuard(self.recurrent.nonfinite)
        if self.memory is None:
            trainer.add_callback(_GuardCallback(trainer, self.guard))
        else:
            self.loop = RecurrentLoop(
                trainer, self.memory, self.recurrent, self.guard, memory_batches
            )
            trainer.add_callback(_RecurrentCallback(self.loop))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare as the Trainer does, and remember how the training set was prepared."""
        if self._preparation is None and "train" in (*args, *kwargs.values()):
            self._preparation = (args, kwargs)
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]

    def _prepared(self, memory: Memory | None) -> Memory | None:
        """The memory as the Trainer prepared its training set, if it prepares datasets at all."""
        if memory is None or self._preparation is None:
            return memory
        from datasets import Dataset

        args, kwargs = self._preparation
        rows = memory
        if not isinstance(memory, Dataset):
            rows = Dataset.from_list([memory[number] for number in range(len(memory))])
        prepared = self._prepare_dataset(
            rows,
            *("memory" if value == "train" else value for value in args),
            **{key: "memory" if value == "train" else value for key, value in kwargs.items()},
        )
        if not len(prepared):
            raise TrainingError(
                f"none of the {len(memory)} rows of memory is left once "
                f"{type(self).__name__} has prepared them: is every completion cut off?"
            )
        return cast(Memory, prepared)

    @property
    def rounds(self) -> list[Round]:
        """What each round did; empty for plain training."""
        return self.loop.done if self.loop is not None else []

    @property
    def num_nonfinite_steps(self) -> int:
        """Optimizer steps, inner and outer, left out because a gradient was not finite."""
        return self.guard.num_skipped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the latest round's figures beside the training loss."""
        if "loss" in logs and self.rounds:
            latest = self.rounds[-1].as_dict()
            logs = {**logs, **{f"recurrent/{key}": value for key, value in latest.items()}}
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.loop is not None and (
            self.loop.rounds.holders.size > 1 or _as_trainer(self).args.should_save
        ):
            self.loop.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.loop is not None:
            self.loop.resume_from = Path(checkpoint) if checkpoint else None


class _GuardCallback(TrainerCallback):
    """Plain training, the first task's: only non-finite gradients are kept from the weights."""

    def __init__(self, trainer: Trainer, guard: GradientGuard) -> None:
        self._trainer = trainer
        self._guard = guard
        self._parameters: dict[str, nn.Parameter] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        self._parameters = trained_parameters(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scaled = self._trainer.accelerator.scaler is not None
        self._guard.admits(
            self._parameters, f"optimizer step {state.global_step + 1}", scaled=scaled
        )


class _RecurrentCallback(TrainerCallback):
    """Passes the Trainer's events on to the loop."""

    def __init__(self, loop: RecurrentLoop) -> None:
        self._loop = loop
        self._postponed: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loop.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loop.before_step("new")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loop.after_step("new")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loop.count_inner_step()
        if self._loop.inner_steps == self._loop.options.inner_steps:
            self._loop.finish_round()
        elif state.global_step >= state.max_steps or control.should_training_stop:
            self._loop.finish_tail()
        self._postpone_until_settled(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:
            self._loop.finish_tail()
        self._postpone_until_settled(control)

    def _postpone_until_settled(self, control: TrainerControl) -> None:
        """Move a wish to save or evaluate to the end of the round."""
        for wish in ("should_save", "should_evaluate"):
            if not self._loop.is_settled:
                if getattr(control, wish):
                    self._postponed.add(wish)
                setattr(control, wish, False)
            elif wish in self._postponed:
                self._postponed.discard(wish)
                setattr(control, wish, True)


def _indexable(memory: Any) -> Memory | None:
    """The memory, or None if there is none or nothing in it."""
    if memory is None:
        return None
    if not (hasattr(memory, "__len__") and hasattr(memory, "__getitem__")):
        raise TrainingError(
            f"memory must have a length and numbered rows, found {type(memory).__name__}: "
            "pass a list or a map-style dataset"
        )
    return cast(Memory, memory) if len(memory) else None


def refuse_sharded(trainer: Trainer) -> None:
    """Raise TrainingError, by name, where a model is divided in a way that the loop cannot follow.

    It follows FSDP2, whose processes hold parts of every parameter and train on rows of their own:
    through accelerate, or sharded when the model was loaded. What counts is what runs: FSDP asked
    for without GPUs runs as DDP, which is fine.
    """
    engine = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    is_fsdp2 = bool(getattr(trainer.accelerator, "is_fsdp2", False))
    divided = {
        "DeepSpeed": trainer.is_deepspeed_enabled or engine == "DEEPSPEED",
        "FSDP through XLA": trainer.is_fsdp_xla_enabled,
        "FSDP1": (trainer.is_fsdp_enabled or engine == "FSDP") and not is_fsdp2,
        "Megatron": engine == "MEGATRON_LM",
        "tensor, context or sequence parallelism": (
            trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1
        ),
        "pipeline or expert parallelism": _is_divided_by_layers(trainer.model),
    }
    for name, is_on in divided.items():
        if is_on:
            raise TrainingError(
                f"{name} leaves each process only pieces of the model, its gradients or its rows, "
                "and the recurrent loop needs whole ones: use plain data parallelism (DDP), or "
                "FSDP2 (fsdp_config version 2, or a DistributedConfig with fsdp_size)"
            )


def _is_divided_by_layers(model: Any) -> bool:
    """Whether transformers gave each process other layers, or other experts, as it loaded them."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    return any((getattr(config, name, None) or 1) > 1 for name in ("pp_size", "ep_size"))


def _as_trainer(mixin: RecurrentMixin) -> Trainer:
    if not isinstance(mixin, Trainer):
        raise TrainingError(
            f"{type(mixin).__name__} must derive from RecurrentMixin and a transformers.Trainer, "
            "in this order"
        )
    return mixin


class RecurrentTrainer(RecurrentMixin, Trainer):
    """A stock Trainer with the recurrent loop."""
