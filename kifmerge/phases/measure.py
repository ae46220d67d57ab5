"""Importance of a model that is not being trained: which of its parameters matter for a task.

The gradients of each batch are looked at as they are, without clipping, and no step is made. Each
is taken in and freed while the backward pass goes on, see :mod:`kifmerge.training.intake`, so that
memory is that of the model and of one float32 accumulator per parameter (two under ``ema``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kifmerge.checkpoint.folder import is_folder
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.checkpoint.source import FolderSource, Source, open_source
from kifmerge.checkpoint.workers import num_processors
from kifmerge.errors import (
    MOST_PROBLEMS_SHOWN,
    CheckpointError,
    DataError,
    TrainingError,
    check_at_least,
    check_choices,
    problem_list,
)
from kifmerge.hub.client import Say, silent
from kifmerge.models.data import Example, labels_met
from kifmerge.models.encode import Features, collator, training_features
from kifmerge.models.model import LoadedModel, ModelOptions, known_labels
from kifmerge.models.opening import bring, open_model
from kifmerge.models.origin import opened
from kifmerge.models.parameters import trained_parameters
from kifmerge.models.saved_names import SavedGroup, SavedTensors, chosen, saved_groups, shards
from kifmerge.tensor.importance import (
    ImportanceAccumulator,
    ImportanceOptions,
    MeanAccumulator,
    Sensitivity,
    all_finite,
)
from kifmerge.training.intake import GradientIntake, take_in
from kifmerge.training.train import TrainingOptions, training_device

_ADVICE = "Look at the rows, or take more exact weights: --set model.dtype=float32"
ONE_PROCESS_SMOOTHS = (
    "smoothing goes over the batches in their order: one process does it, several take "
    "--average mean"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How importance is measured on a model that is not being trained.

    Attributes:
        average: the plain ``mean`` of the sensitivity over batches, or ``ema``: smoothed
            sensitivity and uncertainty, as in training.
        sensitivity: see :class:`kifmerge.tensor.importance.ImportanceOptions`.
        batch_size: rows of one batch. It matters: the gradient of a batch is that of its mean loss.
        targets: globs over the names in the checkpoint's files: only parameters that match one are
            measured, which saves time and memory. Empty: all.
        nonfinite: a batch whose loss or gradient is NaN or infinite is left out whole (``skip``),
            or an error (``raise``).
        dtype: of the snapshot; accumulators are float32 in any case.
    """

    average: Literal["mean", "ema"] = "mean"
    sensitivity: Sensitivity = "first"
    batch_size: int = 8
    targets: Sequence[str] = ()
    nonfinite: Literal["skip", "raise"] = "skip"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and empty batches."""
        check_choices(self)
        check_at_least(self, batch_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Importance of a model's parameters for some rows.

    Attributes:
        tensors: ``score/NAME``, or ``sensitivity/NAME`` and ``uncertainty/NAME``, NAME as in the
            checkpoint's files. The accumulators themselves where the files keep a parameter as it
            is; otherwise converted whenever they are asked for.
        shards: keys of the tensors, by the file that holds the parameter.
        not_in_files: parameters that are in none of them, under their own names: a head that was
            made afresh, or a family whose files transformers translates.
        options: what it was measured by.
        model_dtype: of the weights.
        num_samples: rows that were taken in.
        num_batches: batches they came in.
        num_skipped: batches left out because a loss or a gradient was not finite.
    """

    tensors: Mapping[str, Tensor]
    shards: Sequence[Sequence[str]]
    not_in_files: Sequence[str]
    options: MeasureOptions
    model_dtype: str
    num_samples: int
    num_batches: int
    num_skipped: int


def use_share_of_machine(ranks: Ranks) -> None:
    """Take an accelerator, and processors, beside the other ranks of this machine."""
    if ranks.num_local == 1:
        return
    torch.set_num_threads(max(num_processors() // ranks.num_local, 1))
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(ranks.local_rank % torch.accelerator.device_count())


def open_at_rest(
    options: ModelOptions, adapter: str | None, training: TrainingOptions, say: Say = silent
) -> LoadedModel:
    """Open a model to look at it or to let it answer: nothing of it is made afresh.

    Args:
        options: with a reference.
        adapter: its adapter, in a folder or on the Hub.
        training: says on which device.
        say: told what is fetched.

    Raises:
        CheckpointError: it cannot be loaded, or is to be a classifier and has no head.
        TryAgainError: network or server failed, or what came is damaged.
    """
    bring(options, adapter, say)
    kept_in = adapter or str(options.reference)
    if options.kind == "classifier" and not known_labels(opened(kept_in)):
        raise CheckpointError(
            f"{kept_in} is no classifier whose labels are known: expected a kifmerge.json, or a "
            "config.json of a ...ForSequenceClassification, that names them"
        )
    loaded = open_model(options, adapter)
    loaded.model.to(training_device(training))  # type: ignore[arg-type]
    return loaded


def checkpoint_files(options: ModelOptions, adapter: str | None) -> FolderSource | None:
    """The files of a model that was opened, or of its adapter; None of a bare name's.

    Raises:
        CheckpointError: damaged, or quantised.
    """
    folder = opened(adapter or str(options.reference))
    return open_source(folder) if is_folder(folder) else None


def measure_importance(
    loaded: LoadedModel,
    examples: Sequence[Example],
    options: MeasureOptions,
    files: Source | None = None,
    *,
    on_batch: Callable[[int], None] = lambda num_rows: None,
    say: Callable[[str], None] = lambda text: None,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Measure the importance of all parameters with ``requires_grad``; the weights do not change.

    Batches are made of the rows in their order, the last one may be smaller, and every batch
    counts alike; a parameter that a batch's loss does not reach counts as zero there. Dropout is
    off.

    Several ranks, each with the whole model, take turns with the batches, and their means are
    brought together: the result is that of one, but for the rounding of sums.

    Args:
        loaded: the model; left in evaluation mode, without gradients.
        examples: of the task to be important for.
        options: see there.
        files: of the checkpoint, whose names are taken; None: those of ``save_pretrained``.
        on_batch: told the number of rows after each batch.
        say: told what takes longer than expected.
        ranks: share the batches; several only take their plain mean.

    Raises:
        ValueError: several ranks are to smooth over batches.
        DataError: labels that a classifier does not know.
        CheckpointError: a target matches no parameter, or a weight is not finite.
        TrainingError: no parameter is trainable or has a gradient, a batch is not finite under
            ``raise``, or none is under ``skip``.
    """
    if ranks.size > 1 and options.average != "mean":
        raise ValueError(ONE_PROCESS_SMOOTHS)
    _check_labels(loaded, examples)
    model = loaded.model.eval()
    every = trained_parameters(model)
    groups = chosen(saved_groups(model, every, files), options.targets)
    parameters = {name: every[name] for group in groups for name in group.parameters}
    _check_weights(parameters, groups, files)
    batches, collate = _batches(loaded, examples, options.batch_size), collator(loaded)
    own = range(ranks.rank, len(batches), ranks.size)
    on_batch = ranks.adding_up(on_batch)

    def loss_of(number: int) -> Tensor:
        inputs = {k: v.to(model.device) for k, v in collate(batches[own[number]]).items()}
        loss: Tensor = model(**inputs).loss
        return loss

    def on_fault(number: int, fault: str, begins_anew: bool) -> None:
        if options.nonfinite == "raise":
            raise TrainingError(
                f"batch {own[number] + 1} cannot be used: {fault}. {_ADVICE}, or leave such "
                "batches out: --nonfinite skip"
            )
        if begins_anew:
            say(f"batch {own[number] + 1} is left out, {fault}: measuring anew, which takes longer")

    accumulator = _accumulator(parameters, options)
    intake = GradientIntake(parameters, accumulator, options.sensitivity)
    with _only_these_require_gradients(model, parameters), intake:
        own_left_out = take_in(
            len(own),
            loss_of,
            intake,
            on_batch=lambda number: on_batch(len(batches[own[number]])),
            on_fault=on_fault,
        )
    found = ranks.gather([own[number] for number in own_left_out])
    left_out = [number for of_rank in found for number in of_rank]
    if len(left_out) == len(batches):
        raise TrainingError(
            f"loss or gradient of all {len(batches)} batches are not finite: nothing was measured. "
            f"{_ADVICE}"
        )
    if ranks.size > 1:
        share = (len(own) - len(own_left_out)) / (len(batches) - len(left_out))
        for value in accumulator.state_dict().values():
            value.copy_(ranks.sum(value.mul_(share)))
    tensors = SavedTensors(model, accumulator.state_dict(), groups)
    return Measurement(
        tensors=tensors,
        shards=shards(tensors, files),
        not_in_files=[name for group in groups for name in group.not_in_files],
        options=options,
        model_dtype=str(next(iter(parameters.values())).dtype).removeprefix("torch."),
        num_samples=len(examples) - sum(len(batches[number]) for number in left_out),
        num_batches=len(batches) - len(left_out),
        num_skipped=len(left_out),
    )


def write_measurement(
    directory: Path, measurement: Measurement, details: Mapping[str, Any]
) -> None:
    """Write a measurement as an importance snapshot, in shards like those of the checkpoint.

    Args:
        directory: made if need be.
        measurement: what was measured.
        details: what else is known: model, adapter, data, made_by.
    """
    options = measurement.options
    smoothing: dict[str, Any] = {"sensitivity": options.sensitivity}
    if options.average == "ema":
        smoothed = asdict(ImportanceOptions(sensitivity=options.sensitivity))
        smoothing = {name: smoothed[name] for name in ("sensitivity", "score", "betas")}
    write_snapshot(
        directory,
        measurement.tensors,
        {
            **details,
            "options": {"average": options.average, **smoothing},
            "targets": list(options.targets),
            "dtype": options.dtype,
            "model_dtype": measurement.model_dtype,
            "batch_size": options.batch_size,
            "samples": measurement.num_samples,
            "batches": measurement.num_batches,
            "skipped_batches": measurement.num_skipped,
            "not_in_files": list(measurement.not_in_files),
        },
        shards=measurement.shards,
        dtype=_DTYPES[options.dtype],
    )


@contextlib.contextmanager
def _only_these_require_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Spare the backward pass all gradients that nobody looks at."""
    measured = {id(parameter) for parameter in parameters.values()}
    spared = [p for p in model.parameters() if p.requires_grad and id(p) not in measured]
    for parameter in spared:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in spared:
            parameter.requires_grad_(True)


def _batches(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int
) -> list[list[Features]]:
    rows = training_features(loaded, examples)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _accumulator(
    parameters: Mapping[str, nn.Parameter], options: MeasureOptions
) -> MeanAccumulator | ImportanceAccumulator:
    if options.average == "mean":
        return MeanAccumulator(parameters, options.sensitivity)
    return ImportanceAccumulator(parameters, ImportanceOptions(sensitivity=options.sensitivity))


def _check_labels(loaded: LoadedModel, examples: Sequence[Example]) -> None:
    """Refuse rows of a label that a classifier has no logit for."""
    if loaded.options.kind != "classifier":
        return
    strange = [label for label in labels_met(examples) if label not in loaded.labels]
    if strange:
        raise DataError(
            f"labels {', '.join(map(repr, strange[:MOST_PROBLEMS_SHOWN]))} are not among those of "
            f"the model: {', '.join(loaded.labels) or 'it has none'}"
        )


def _check_weights(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[SavedGroup], files: Source | None
) -> None:
    """Refuse weights whose importance cannot be told: NaN times a gradient of zero is NaN."""
    bad = {name for name, parameter in parameters.items() if not all_finite([parameter])}
    if not bad:
        return
    kept = set(files.names()) if files is not None else set()
    names = [n for group in groups if bad & {*group.parameters} for n in group.file_names()]
    raise CheckpointError(
        problem_list(
            "cannot measure the importance of weights that hold NaN or infinity",
            [f"{n} in {files.where(n)}" if files is not None and n in kept else n for n in names],
        )
    )
