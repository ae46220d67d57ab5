"""Importance of a model that is not being trained: which of its parameters matter for a task.

The gradients of each batch are looked at as they are, without clipping, and no step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.checkpoint.source import Source
from kifmerge.errors import (
    MOST_PROBLEMS_SHOWN,
    CheckpointError,
    DataError,
    TrainingError,
    check_at_least,
    check_choices,
)
from kifmerge.phases.data import Example, labels_met
from kifmerge.phases.encode import collator, training_features
from kifmerge.phases.importance import as_in_checkpoint, require_gradients, trained_parameters
from kifmerge.phases.model import LoadedModel, ModelOptions, known_labels
from kifmerge.phases.opening import open_model
from kifmerge.phases.train import TrainingOptions, training_device
from kifmerge.tensor.importance import (
    ImportanceAccumulator,
    ImportanceOptions,
    MeanAccumulator,
    Sensitivity,
    all_finite,
)

_ADVICE = "Look at the rows, or take more exact weights: --set model.dtype=float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How importance is measured on a model that is not being trained.

    Attributes:
        average: the plain ``mean`` of the sensitivity over batches, or ``ema``: smoothed
            sensitivity and uncertainty, as in training.
        sensitivity: see :class:`kifmerge.tensor.importance.ImportanceOptions`.
        batch_size: rows of one batch. It matters: the gradient of a batch is that of its mean loss.
        nonfinite: a batch with a NaN or infinite gradient is left out whole (``skip``), or an
            error (``raise``).
    """

    average: Literal["mean", "ema"] = "mean"
    sensitivity: Sensitivity = "first"
    batch_size: int = 8
    nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and empty batches."""
        check_choices(self)
        check_at_least(self, batch_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Importance of a model's parameters for some rows.

    Attributes:
        tensors: ``score/NAME``, or ``sensitivity/NAME`` and ``uncertainty/NAME``, NAME as in the
            checkpoint's files.
        not_in_files: parameters that are in none of them, under their own names: a head that was
            made afresh, or a family whose files transformers translates.
        options: what it was measured by.
        dtype: of the weights.
        num_samples: rows that were taken in.
        num_batches: batches they came in.
        num_skipped: batches left out because a gradient was not finite.
    """

    tensors: Mapping[str, Tensor]
    not_in_files: Sequence[str]
    options: MeasureOptions
    dtype: str
    num_samples: int
    num_batches: int
    num_skipped: int


def open_at_rest(
    options: ModelOptions, adapter: str | None, training: TrainingOptions
) -> LoadedModel:
    """Open a model to look at it or to let it answer: nothing of it is made afresh.

    Args:
        options: with a reference.
        adapter: folder of its adapter.
        training: says on which device.

    Raises:
        CheckpointError: it cannot be loaded, or is to be a classifier and has no head.
    """
    kept_in = adapter or str(options.reference)
    if options.kind == "classifier" and not known_labels(Path(kept_in)):
        raise CheckpointError(
            f"{kept_in} is no classifier whose labels are known: expected a kifmerge.json, or a "
            "config.json of a ...ForSequenceClassification, that names them"
        )
    loaded = open_model(options, adapter)
    loaded.model.to(training_device(training))  # type: ignore[arg-type]
    return loaded


def measure_importance(
    loaded: LoadedModel,
    examples: Sequence[Example],
    options: MeasureOptions,
    files: Source | None = None,
    *,
    on_batch: Callable[[int], None] = lambda num_rows: None,
) -> Measurement:
    """Measure the importance of all parameters with ``requires_grad``; the weights do not change.

    Batches are made of the rows in their order, the last one may be smaller, and every batch
    counts alike. Dropout is off.

    Args:
        loaded: the model; left in evaluation mode, without gradients.
        examples: of the task to be important for.
        options: see there.
        files: of the checkpoint, whose names are taken; None: those of ``save_pretrained``.
        on_batch: told the number of rows after each batch.

    Raises:
        DataError: labels that a classifier does not know.
        TrainingError: no parameter is trainable or has a gradient, a gradient is not finite under
            ``raise``, or none is under ``skip``.
    """
    _check_labels(loaded, examples)
    model = loaded.model.eval()
    rows, collate = training_features(loaded, examples), collator(loaded)
    parameters = trained_parameters(model)
    weights = list(parameters.values())
    accumulator = _accumulator(parameters, options)
    num_samples = num_batches = 0
    try:
        for start in range(0, len(rows), options.batch_size):
            batch = rows[start : start + options.batch_size]
            inputs = {key: value.to(model.device) for key, value in collate(batch).items()}
            model.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()
            gradients = [weight.grad for weight in weights]
            require_gradients(gradients)
            if accumulator.update(weights, gradients):
                num_samples, num_batches = num_samples + len(batch), num_batches + 1
            elif options.nonfinite == "raise":
                raise _nonfinite_error(parameters, start // options.batch_size + 1)
            on_batch(len(batch))
    finally:
        model.zero_grad(set_to_none=True)
    if not num_batches:
        raise TrainingError(
            f"the gradients of all {accumulator.num_skipped} batches are not finite: nothing was "
            f"measured. {_ADVICE}"
        )
    tensors, missing = _saved_tensors(model, accumulator.state_dict(), files)
    return Measurement(
        tensors=tensors,
        not_in_files=missing,
        options=options,
        dtype=str(weights[0].dtype).removeprefix("torch."),
        num_samples=num_samples,
        num_batches=num_batches,
        num_skipped=accumulator.num_skipped,
    )


def write_measurement(
    directory: Path, measurement: Measurement, details: Mapping[str, Any]
) -> None:
    """Write a measurement as an importance snapshot.

    Args:
        directory: made if need be.
        measurement: what was measured.
        details: what else is known: model, adapter, data, made_by.
    """
    options = measurement.options
    smoothing: dict[str, Any] = {"sensitivity": options.sensitivity}
    if options.average == "ema":
        smoothing = asdict(ImportanceOptions(sensitivity=options.sensitivity))
        del smoothing["weights"]  # before or after a step: none was made
    write_snapshot(
        directory,
        measurement.tensors,
        {
            **details,
            "options": {"average": options.average, **smoothing},
            "dtype": measurement.dtype,
            "batch_size": options.batch_size,
            "samples": measurement.num_samples,
            "batches": measurement.num_batches,
            "skipped_batches": measurement.num_skipped,
            "not_in_files": list(measurement.not_in_files),
        },
    )


def names_in_files(
    model: nn.Module, values: Mapping[str, Tensor], files: Source
) -> dict[str, list[str]]:
    """Under which names a checkpoint's files keep each parameter; none if it is not in them.

    Published files may differ from what ``save_pretrained`` would write: without the prefix of the
    base model, or with tied weights under another name or under several.

    Args:
        model: with the parameters.
        values: one tensor per parameter, under the name that ``save_pretrained`` would write.
        files: of the checkpoint.
    """
    kept = {name: files.info(name).shape for name in files.names()}
    tied: dict[int, list[str]] = {}
    of_name: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of_name[name] = tied.setdefault(id(parameter), [])
        of_name[name].append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, value in values.items():
        names = dict.fromkeys((name, *of_name.get(name, ())))
        shape = tuple(value.shape)
        found[name] = [n for n in names if kept.get(n) == shape] or [
            bare for bare in (n.removeprefix(prefix) for n in names) if kept.get(bare) == shape
        ]
    return found


def _saved_tensors(
    model: nn.Module, state: Mapping[str, Tensor], files: Source | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Accumulators, ``KIND/NAME``, under the names of the files, and the names not found there."""
    by_kind: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        by_kind.setdefault(kind, {})[name] = value
    tensors: dict[str, Tensor] = {}
    missing: list[str] = []
    for kind, values in by_kind.items():
        saved = as_in_checkpoint(model, values)
        names = names_in_files(model, saved, files) if files is not None else {}
        missing = [name for name in names if not names[name]]
        for name, value in saved.items():
            first, *others = names.get(name) or [name]
            tensors[f"{kind}/{first}"] = value
            # A safetensors file refuses tensors that share memory.
            tensors.update({f"{kind}/{other}": value.clone() for other in others})
    return tensors, missing


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


def _nonfinite_error(parameters: Mapping[str, nn.Parameter], number: int) -> TrainingError:
    bad = [n for n, p in parameters.items() if p.grad is not None and not all_finite([p.grad])]
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return TrainingError(
        f"the gradient of batch {number} is not finite, in {shown}. {_ADVICE}, or leave such "
        "batches out: --nonfinite skip"
    )
