"""KIF after a task is learnt: its skill units, fusion with all earlier tasks, what KIF-M trains.

Parameters go by the names of the checkpoint's own files, so that ``units.json`` of a run, and the
weights, are those of a shell chain of train, group and merge.

References:
    KIF, arXiv 2408.05200 v4, with the rules of the authors' released code. KIF-M is a
    reconstruction from notes on the paper, unverified: there is no code of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource, Source, open_source, read_whole
from kifmerge.checkpoint.units import Units, UnitSource, read_units
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.fusion.evidence import evidence_from_units
from kifmerge.fusion.fuse import fuse
from kifmerge.fusion.unit_scores import group_scores
from kifmerge.fusion.weights import Weights
from kifmerge.models.parameters import as_in_checkpoint, trained_parameters
from kifmerge.models.saved_names import saved_groups
from kifmerge.tensor.units import important_units
from kifmerge.training.kif_training import read_task_scores
from kifmerge.training.presets import KifOptions
from kifmerge.training.resumable import CHECKPOINT

KifRule = Literal["kif", "kif-adaptive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTask:
    """What KIF found of a task.

    Attributes:
        units: with the task's scores, and the cumulative ones.
        historical: units after the task before; None after the first task.
        shares: of the parameters: in units important to ``both`` sides, to one, or to ``neither``.
    """

    units: Units
    historical: Units | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


def fuse_task(
    model: nn.Module, before: Path | None, state_dir: Path, rule: KifRule, options: KifOptions
) -> FusedTask:
    """Score the units of a task that was trained, and fuse it with all earlier ones, in place.

    Args:
        model: with the weights after training; the first task's stay as they are.
        before: stage of the task before; None after the first task.
        state_dir: state of the task's last step.
        rule: ``kif`` or ``kif-adaptive``.
        options: of KIF.

    Raises:
        CheckpointError: scores, weights or units of another model.
    """
    historical = None if before is None else read_units(before)
    units = task_units(model, state_dir, options, historical)
    if len({unit.score for unit in units.units}) == 1:
        warnings.warn("the scores of all units are equal: no unit is important", stacklevel=2)
    if before is None or historical is None:
        return FusedTask(units=units)
    both = {"new": units, "historical": historical}
    shares = fuse_units(model, open_source(before / CHECKPOINT), both, rule, options)
    return FusedTask(units=units, historical=historical, shares=shares)


def refuse_converted(model: nn.Module) -> None:
    """Raise TrainingError for families whose files hold other pieces than the live model.

    Their skill units are those of the files, and there only they can be fused.
    """
    for group in saved_groups(model, trained_parameters(model), None):
        if group.is_converted:
            raise TrainingError(
                f"{group.parameters[0]} is saved in other pieces than it is trained in, such as "
                f"{next(iter(group.names))}: KIF cannot fuse it in one process. Chain train --kif, "
                "group and merge, which work on files"
            )


def task_units(
    model: nn.Module, state_dir: Path, options: KifOptions, historical: Units | None
) -> Units:
    """The skill units of a task that was trained, with its scores and the cumulative ones.

    Args:
        model: whose parameters were scored.
        state_dir: state of the task's last step.
        options: of KIF.
        historical: units after the task before; None after the first task.

    Raises:
        CheckpointError: no scores in the state, or units of another model.
    """
    tensors, _ = read_task_scores(state_dir)
    saved: dict[str, Tensor] = {}
    for kind in ("sensitivity", "uncertainty"):
        prefix = f"{kind}/"
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        saved |= {f"{prefix}{n}": value for n, value in as_in_checkpoint(model, values).items()}
    return group_scores(
        Scores(MemorySource(saved), options.score),
        options.unit,
        historical,
        new_weight=options.new_weight,
        cumulative_weight=options.cumulative_weight,
    )


def fuse_units(
    model: nn.Module,
    historical: Source,
    units: Mapping[str, Units],
    rule: KifRule,
    options: KifOptions,
) -> dict[str, float]:
    """Fuse a model that has learnt a new task with what it was before, unit by unit, in place.

    Rows that a classifier's head has gained with the new task have no history: they stay.

    Args:
        model: the new weights; becomes the fused ones.
        historical: the weights before the task.
        units: ``new`` those of the task, ``historical`` those after the task before.
        rule: ``kif`` or ``kif-adaptive``.
        options: of KIF.

    Returns:
        Under ``kif`` the shares of parameters in units important to ``both``...

    Raises:
        CheckpointError: weights or units of another model.
    """
    live = _live(model)
    sink = MemorySink(live)
    weights = Weights(
        base=None,
        models=[MemorySource(live), MemorySource(_in_shape(historical, live))],
        nonfinite="keep",  # the guard has looked at every gradient
    )
    fusion = options.fusion(rule)
    evidence = evidence_from_units(units, MemorySource(live), fusion)
    overlap = fuse(live, weights, evidence, fusion, sink)
    sink.commit()
    return overlap.shares()


def important_elements(
    model: nn.Module, historical: Units, important_fraction: float
) -> dict[str, Tensor]:
    """Which elements of the live parameters belong to units important to earlier tasks.

    Args:
        model: live.
        historical: units before the new task; their cumulative scores count.
        important_fraction: see :func:`kifmerge.tensor.units.important_units`.

    Returns:
        Live name -> bool, in the shape of the parameter.
    """
    parameters = trained_parameters(model)
    marks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    saved = as_in_checkpoint(model, marks)
    chosen = important_units([u.cumulative for u in historical.units], important_fraction)
    of_units = UnitSource(historical, MemorySource(saved), chosen, "historical units")
    for name in of_units.names():
        values = of_units.read(name, 0, saved[name].numel())
        saved[name].copy_(values.view(saved[name].shape))
    return marks


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, not copied, under their names in files."""
    parameters = {name: p.detach() for name, p in trained_parameters(model).items()}
    return as_in_checkpoint(model, parameters)


def _in_shape(source: Source, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; where the live one has gained rows, those are its own."""
    found = {}
    for name, value in live.items():
        kept = read_whole(source, name).to(value)
        if kept.shape != value.shape:
            if kept.shape[1:] != value.shape[1:] or len(kept) > len(value):
                raise CheckpointError(
                    f"{source.where(name)}: {name}: expected {list(value.shape)}, or fewer rows, "
                    f"found {list(kept.shape)}"
                )
            kept = torch.cat([kept, value[len(kept) :]])
        found[name] = kept
    return found
