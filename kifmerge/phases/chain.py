"""One step of a shell chain: from references to a whole output folder, or to nothing at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.provenance import (
    PROVENANCE_FILE,
    is_made,
    made_by,
)
from kifmerge.checkpoint.units import DETAIL_FILE as UNITS_FILE
from kifmerge.checkpoint.units import read_units
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.hub.client import Say, silent
from kifmerge.models.data import Example
from kifmerge.models.model import LoadedModel, ModelOptions
from kifmerge.models.opening import bring, open_model
from kifmerge.models.origin import on_hub, opened
from kifmerge.training.presets import KifOptions, RecurrentOptions
from kifmerge.training.resumable import CHECKPOINT, newest_step
from kifmerge.training.state import open_state
from kifmerge.training.steps import (
    PhaseOptions,
    PhaseRecord,
    kept_record,
    replay_steps,
    train_steps,
)
from kifmerge.training.train import (
    Progress,
    TrainingOptions,
    refuse_process_group,
    training_device,
)

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStep:
    """What ``train`` and ``replay`` share.

    Attributes:
        model: which, and how it is used; with a reference.
        adapter: on top of it: a folder, or on the Hub.
        training: optimization of the whole task.
        recurrent: the loop.
        seed: of row order, dropout and memory batches.
        initial_seed: of a fresh adapter or head.
        labels: that a classifier's head must cover, in order.
        source: of the rows, see :func:`kifmerge.models.data.read_examples`.
        state_dir: left by the step before; None begins a task.
        num_steps: optimizer steps to make; None: all that are left of the task.
        kif: scores the whole task for KIF; None scores a round's steps for the recurrent loop.
        only_units: skill units, in a folder or on the Hub; trains only those important to earlier
            tasks, as the pass of KIF-M over memory does, with the important fraction of ``kif``.

    What is on the Hub is pinned to a commit.
    """

    model: ModelOptions
    adapter: str | None
    training: TrainingOptions
    recurrent: RecurrentOptions
    seed: int
    initial_seed: int
    source: str
    labels: Sequence[str] = field(default_factory=list)
    state_dir: Path | None = None
    num_steps: int | None = None
    kif: KifOptions | None = None
    only_units: str | None = None

    def made_by(self, command: str) -> dict[str, Any]:
        """What is recorded in the folder that the step makes."""
        options = {
            "model": asdict(self.model),
            "training": asdict(self.training),
            "recurrent": asdict(self.recurrent),
            "seed": self.seed,
            "initial_seed": self.initial_seed,
            "labels": list(self.labels),
            "num_steps": self.num_steps,
        }
        if self.kif is not None:
            options["kif"] = asdict(self.kif)
        parents = {
            "model": self.model.reference,
            "adapter": self.adapter,
            "data" if command == "train" else "memory": self.source,
            "state": self.state_dir,
            "units": self._units(),
        }
        return made_by(command, options, parents)

    def _units(self) -> Path | str | None:
        if self.only_units is None or on_hub(self.only_units) is not None:
            return self.only_units
        return Path(self.only_units) / UNITS_FILE


def train_into(
    out_dir: Path,
    step: ChainStep,
    examples: Sequence[Example],
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda progress: None,
    say: Say = silent,
) -> tuple[PhaseRecord, bool]:
    """Make inner steps on a task's rows, and ``out_dir`` with what they lead to.

    A call that was interrupted goes on from its latest checkpoint, kept beside ``out_dir``.

    Returns:
        What the step did, and whether it was made now: False if the folder was there already.

    Raises:
        RunError: the folder holds something else.
        CheckpointError: model, adapter or state cannot be used.
        TryAgainError: network or server failed, or what came is damaged.
    """
    refuse_process_group()
    wanted = step.made_by("train")
    step_dir = _step_dir(out_dir, wanted)
    if is_made(out_dir, PROVENANCE_FILE, wanted, overwrite=overwrite):
        shutil.rmtree(step_dir, ignore_errors=True)
        return kept_record(out_dir), False
    options = _phase_options(step, step_dir, wanted, _data_mark(wanted))
    interrupted = newest_step(step_dir)
    weights = interrupted / CHECKPOINT if interrupted is not None else None
    loaded = _opened(step, weights, say)
    with whole_folder(out_dir, overwrite=overwrite) as temporary:
        record = train_steps(
            loaded, examples, options, temporary, num_steps=step.num_steps, on_progress=on_progress
        )
    shutil.rmtree(step_dir, ignore_errors=True)
    return record, True


def replay_into(
    out_dir: Path,
    step: ChainStep,
    memory: Sequence[Example],
    *,
    overwrite: bool = False,
    say: Say = silent,
) -> tuple[PhaseRecord, bool]:
    """Make outer steps on memory, and ``out_dir`` with what they lead to; see train_into."""
    refuse_process_group()
    if step.kif is not None:
        raise TrainingError(
            f"{step.state_dir} is the state of train --kif: KIF makes no outer steps. Go on with "
            "group and merge, or for KIF-M with train --only-units"
        )
    wanted = step.made_by("replay")
    if is_made(out_dir, PROVENANCE_FILE, wanted, overwrite=overwrite):
        return kept_record(out_dir), False
    kept = {} if step.state_dir is None else _kept_state(step.state_dir)
    data = kept["identity"]["data"] if kept else None
    step_dir = _step_dir(out_dir, wanted)
    options = _phase_options(step, step_dir, wanted, data)
    num_steps = step.num_steps or step.recurrent.outer_steps
    loaded = _opened(step, None, say)
    with whole_folder(out_dir, overwrite=overwrite) as temporary:
        record = replay_steps(
            loaded,
            memory,
            options,
            temporary,
            num_steps=num_steps,
            total_steps=kept["total_steps"] if kept else num_steps,
        )
    shutil.rmtree(step_dir, ignore_errors=True)
    return record, True


def kept_sections(state_dir: Path | None) -> dict[str, Any]:
    """Options that a state was made under: training, recurrent, seed; kif if it scores for KIF."""
    if state_dir is None:
        return {}
    identity: dict[str, Any] = _kept_state(state_dir)["identity"]
    kept = {key: identity[key] for key in ("training", "recurrent", "seed")}
    return kept if identity.get("kif") is None else {**kept, "kif": identity["kif"]}


def _kept_state(state_dir: Path) -> dict[str, Any]:
    content = open_state(state_dir)
    if "data" not in content.get("identity", {}):
        raise CheckpointError(
            f"{state_dir} is the state of a whole run: expected one that train or replay left"
        )
    return content


def _data_mark(wanted: dict[str, Any]) -> str:
    """What rows of the new task are known by: their digest, or on the Hub the pinned reference."""
    data = wanted["parents"]["data"]
    return str(data["digest"] or data["reference"])


def _opened(step: ChainStep, weights: Path | None, say: Say) -> LoadedModel:
    """The step's model; of an interrupted step the weights it had come to."""
    model, adapter = step.model, step.adapter
    bring(model, adapter, say)
    if weights is not None and model.lora is not None:
        adapter = str(weights)
    elif weights is not None:
        model = replace(model, reference=str(weights))
    loaded = open_model(model, adapter, step.labels, seed=step.initial_seed)
    loaded.options = step.model
    loaded.model.to(training_device(step.training))  # type: ignore[arg-type]
    return loaded


def _phase_options(
    step: ChainStep, step_dir: Path, wanted: dict[str, Any], data: str | None
) -> PhaseOptions:
    return PhaseOptions(
        training=step.training,
        recurrent=step.recurrent,
        seed=step.seed,
        data=data,
        state_dir=step.state_dir,
        step_dir=step_dir,
        made_by=wanted,
        kif=step.kif,
        only_units=None if step.only_units is None else read_units(opened(step.only_units)),
    )


def _step_dir(out_dir: Path, wanted: dict[str, Any]) -> Path:
    """Where a long step keeps its checkpoints; another step into the same folder has another."""
    mark = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    return out_dir.with_name(f"{out_dir.name}.{mark}.training")
