"""Importance snapshots from any stock Trainer, with one added line.

    trainer.add_callback(ImportanceCallback())

The callback only watches: it changes neither gradients nor weights. A snapshot is written into
every checkpoint the Trainer saves, and into the output folder when training ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kifmerge.checkpoint.holders import holders_of
from kifmerge.checkpoint.snapshot import (
    read_snapshot,
    write_gathered_snapshot,
    write_snapshot,
)
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.models.gathered import gathered_parts
from kifmerge.models.parameters import as_in_checkpoint, checkpoint_names, trained_parameters
from kifmerge.tensor.importance import ImportanceAccumulator, ImportanceOptions
from kifmerge.tensor.sharding import is_sharded, part_like, sharded_like
from kifmerge.training.guard import nonfinite_error
from kifmerge.training.threads import training_workers

SNAPSHOT_FOLDER = "importance"


class ImportanceCallback(TrainerCallback):
    """Accumulates the importance of all trained parameters and writes snapshots.

    Args:
        options: how importance is measured.
        details: recorded in the snapshot: role, task, model reference...
        nonfinite: what to do with a step whose gradient is not finite: leave it out of the
            importance and count it (``skip``), or end the training (``raise``).

    Raises:
        TrainingError: no parameter has a gradient (DeepSpeed, LOMO), or a gradient is not finite
            under ``raise``.
    """

    def __init__(
        self,
        options: ImportanceOptions | None = None,
        *,
        details: Mapping[str, Any] | None = None,
        nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        self.options = options or ImportanceOptions()
        self.details = dict(details or {})
        self.nonfinite = nonfinite
        self.accumulator: ImportanceAccumulator | None = None
        self._parameters: dict[str, nn.Parameter] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set up the accumulators, on the device where the parameters are."""
        refuse_without_gradients(args)
        self._parameters = trained_parameters(kwargs["model"])
        self.accumulator = ImportanceAccumulator(self._parameters, self.options)
        if state.global_step > 0:
            self._resume(checkpoint_dir(args, state) / SNAPSHOT_FOLDER, kwargs["model"])

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in self._parameters.values())

    def _resume(self, directory: Path, model: nn.Module) -> None:
        """Go on from the snapshot of the checkpoint that the Trainer resumes from."""
        assert self.accumulator is not None
        names = checkpoint_names(model)
        try:
            kept = read_snapshot(directory)
            tensors = kept.tensors()
            state = {
                f"{kind}/{name}": tensors[f"{kind}/{names[name]}"]
                for kind in ("sensitivity", "uncertainty")
                for name in names
            }
        except (CheckpointError, KeyError) as error:
            raise CheckpointError(
                f"cannot go on with the importance of the steps before: {directory} holds no "
                f"snapshot of this model ({error})"
            ) from error
        own = {k: part_like(v, self._parameters[k.partition("/")[2]]) for k, v in state.items()}
        self.accumulator.load_state_dict(own, num_steps=kept.details["steps"])
        self.accumulator.num_skipped = kept.details["skipped_steps"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe here when weights are taken before the step."""
        if self.options.weights == "before":
            self._observe(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe here when weights are taken after the step."""
        if self.options.weights == "after":
            self._observe(state.global_step)

    def _observe(self, step: int) -> None:
        assert self.accumulator is not None
        gradients = [parameter.grad for parameter in self._parameters.values()]
        if step == 0:
            require_gradients(gradients)
        live = list(self._parameters.values())
        with training_workers(live) as workers:
            taken = self.accumulator.update(live, gradients, spread=workers.map)
        if not taken and self.nonfinite == "raise":
            raise nonfinite_error(self._parameters, f"optimizer step {step + 1}")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the snapshot into the checkpoint just saved."""
        if self._is_sharded or state.is_world_process_zero:
            self.write(checkpoint_dir(args, state) / SNAPSHOT_FOLDER, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the final snapshot into the output folder."""
        if self._is_sharded or state.is_world_process_zero:
            self.write(Path(str(args.output_dir)) / SNAPSHOT_FOLDER, kwargs["model"])

    def write(self, directory: Path, model: nn.Module) -> None:
        """Write the snapshot of this moment, under the names of the checkpoint's own files.

        All processes of a sharded model call it together.
        """
        assert self.accumulator is not None
        write_accumulator(directory, self.accumulator, model, self.details)


def write_accumulator(
    directory: Path,
    accumulator: ImportanceAccumulator,
    model: nn.Module,
    details: Mapping[str, Any],
) -> None:
    """Write an accumulator as a snapshot under the names of the checkpoint's own files.

    Args:
        directory: made if need be.
        accumulator: of all trained parameters of the model.
        model: if it is sharded (``fully_shard``), all processes call this together, between two
            steps, and each writes a part.
        details: to be recorded: role, task, model reference...
    """
    details = {
        **details,
        "steps": accumulator.num_steps,
        "skipped_steps": accumulator.num_skipped,
        "options": asdict(accumulator.options),
    }
    parameters = trained_parameters(model)
    ranks = holders_of(parameters)
    if ranks.size > 1:
        state = {
            key: sharded_like(value, parameters[key.partition("/")[2]])
            for key, value in accumulator.state_dict().items()
        }
        write_gathered_snapshot(directory, gathered_parts(model, state), details, ranks)
        return
    kinds = {"sensitivity": accumulator.sensitivity, "uncertainty": accumulator.uncertainty}
    tensors = {
        f"{kind}/{name}": value
        for kind, values in kinds.items()
        for name, value in as_in_checkpoint(model, values).items()
    }
    write_snapshot(directory, tensors, details, dtype=torch.float32)


def checkpoint_dir(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def require_gradients(gradients: list[Tensor | None]) -> None:
    """Raise TrainingError when not one parameter has a gradient to look at."""
    if all(gradient is None for gradient in gradients):
        raise TrainingError(
            "no parameter has a gradient at the optimizer step: the backward pass, or an engine "
            "such as DeepSpeed, has already used them up. Importance needs p.grad."
        )


def refuse_without_gradients(args: TrainingArguments) -> None:
    """Raise TrainingError, by name, for engines and optimizers that leave no ``p.grad``."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if args.deepspeed:
        raise TrainingError("DeepSpeed keeps gradients to itself: importance needs p.grad")
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise TrainingError(
            f"optimizer {optimizer} applies gradients during the backward pass and leaves no "
            "p.grad: choose another, such as adamw_torch"
        )
