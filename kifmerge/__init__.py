"""Continual learning without forgetting: importance-guided fusion of checkpoints.

Public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kifmerge.checkpoint.snapshot import Snapshot, read_snapshot
    from kifmerge.errors import KifmergeError
    from kifmerge.models.gathered import write_checkpoint
    from kifmerge.models.parameters import trained_parameters
    from kifmerge.phases.memory import select_memory
    from kifmerge.recipe import Recipe, load_recipe
    from kifmerge.run import collect_report, run_recipe
    from kifmerge.tensor.fusion import recurrent_kif, recurrent_kif_adaptive
    from kifmerge.tensor.importance import ImportanceAccumulator, ImportanceOptions
    from kifmerge.tensor.metrics import continual_metrics
    from kifmerge.tensor.selection import Threshold, importance_threshold, kth_smallest
    from kifmerge.training.importance import ImportanceCallback, write_accumulator
    from kifmerge.training.presets import PRESETS, RecurrentOptions
    from kifmerge.training.recurrent import RecurrentRounds, Round
    from kifmerge.training.trainer import RecurrentMixin, RecurrentTrainer

_HOMES = {
    "ImportanceAccumulator": "tensor.importance",
    "ImportanceCallback": "training.importance",
    "ImportanceOptions": "tensor.importance",
    "KifmergeError": "errors",
    "PRESETS": "training.presets",
    "Recipe": "recipe",
    "RecurrentMixin": "training.trainer",
    "RecurrentOptions": "training.presets",
    "RecurrentRounds": "training.recurrent",
    "RecurrentTrainer": "training.trainer",
    "Round": "training.recurrent",
    "Snapshot": "checkpoint.snapshot",
    "Threshold": "tensor.selection",
    "collect_report": "run",
    "continual_metrics": "tensor.metrics",
    "importance_threshold": "tensor.selection",
    "kth_smallest": "tensor.selection",
    "load_recipe": "recipe",
    "read_snapshot": "checkpoint.snapshot",
    "recurrent_kif": "tensor.fusion",
    "recurrent_kif_adaptive": "tensor.fusion",
    "run_recipe": "run",
    "select_memory": "phases.memory",
    "trained_parameters": "models.parameters",
    "write_accumulator": "training.importance",
    "write_checkpoint": "models.gathered",
}

__all__ = [
    "PRESETS",
    "ImportanceAccumulator",
    "ImportanceCallback",
    "ImportanceOptions",
    "KifmergeError",
    "Recipe",
    "RecurrentMixin",
    "RecurrentOptions",
    "RecurrentRounds",
    "RecurrentTrainer",
    "Round",
    "Snapshot",
    "Threshold",
    "collect_report",
    "continual_metrics",
    "importance_threshold",
    "kth_smallest",
    "load_recipe",
    "read_snapshot",
    "recurrent_kif",
    "recurrent_kif_adaptive",
    "run_recipe",
    "select_memory",
    "trained_parameters",
    "write_accumulator",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
