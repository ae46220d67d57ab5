"""Trainer state on disk: everything beside the weights that the next step depends on.

state.json               format, version, what the training is (to refuse another's state),
                         param groups, schedule, gradient scaler, scalars of the random generators
trainer_state.json       the Trainer's own: step and epoch, which give the position in the data
optimizer.safetensors    ``PARAMETER/KEY``
rng.safetensors          random generators
recurrent.*              accumulators and counters of the recurrent loop, if there is one

Tensors in safetensors and the rest in JSON: nothing here is a pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.errors import CheckpointError, TrainingError, problem_list
from kifmerge.models.parameters import trained_parameters

if TYPE_CHECKING:
    from kifmerge.training.loop import RecurrentLoop

FORMAT = "kifmerge.state"
VERSION = 1
STATE_FILE = "state.json"
TRAINER_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"


def write_state(
    directory: Path,
    trainer: Trainer,
    loop: RecurrentLoop | None,
    identity: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Write the state of a Trainer between two steps into a folder that exists.

    Args:
        directory: of this state alone.
        trainer: in training.
        loop: its recurrent loop.
        identity: what the training is: :func:`read_state` compares it.
        figures: further JSON to keep.
    """
    tensors, scalars = optimizer_state(trainer)
    safetensors.torch.save_file(tensors, directory / OPTIMIZER_FILE)
    generators, numbers = _generators()
    safetensors.torch.save_file(generators, directory / RNG_FILE)
    trainer.state.save_to_json(str(directory / TRAINER_FILE))
    if loop is not None:
        loop.save(directory)
    scaler = trainer.accelerator.scaler
    write_json(
        directory / STATE_FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            "step": trainer.state.global_step,
            "total_steps": trainer.state.max_steps,
            "identity": _plain(identity),
            "optimizer": scalars,
            "schedule": _plain(_without_functions(trainer.lr_scheduler)),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": numbers,
            **figures,
        },
    )


def open_state(directory: Path) -> dict[str, Any]:
    """The JSON of a state, whatever training it is of.

    Raises:
        CheckpointError: no state, or one of a newer version.
    """
    content = read_details(directory / STATE_FILE)
    if not content:
        raise CheckpointError(f"{directory} holds no trainer state: no {STATE_FILE}")
    check_format(content, FORMAT, VERSION, directory / STATE_FILE)
    return content


def read_state(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a state, found to be of the same training.

    Raises:
        CheckpointError: no state, one of a newer version, or another training's.
    """
    content = open_state(directory)
    before, now = content["identity"], _plain(identity)
    problems = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if problems:
        raise CheckpointError(problem_list(f"{directory} is the state of another run", problems))
    return content


def restore_optimizer(trainer: Trainer, directory: Path) -> None:
    """Restore optimizer, schedule and scaler; the Trainer has made them already.

    Raises:
        CheckpointError: a damaged file, or the state of other parameters.
    """
    content = read_details(directory / STATE_FILE)
    assert trainer.optimizer is not None
    assert trainer.lr_scheduler is not None
    state = _indexed_state(trainer, _tensors(directory / OPTIMIZER_FILE), content["optimizer"])
    groups = [
        {**kept, "params": own["params"]}
        for kept, own in zip(
            content["optimizer"]["groups"],
            trainer.optimizer.state_dict()["param_groups"],
            strict=True,
        )
    ]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.lr_scheduler.load_state_dict(content["schedule"])
    if trainer.accelerator.scaler is not None and content["scaler"]:
        trainer.accelerator.scaler.load_state_dict(content["scaler"])


def restore_generators(directory: Path) -> None:
    """Restore the random generators of this process."""
    numbers = read_details(directory / STATE_FILE)["rng"]
    tensors = _tensors(directory / RNG_FILE)
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = numbers["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda/{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{number}"], number)


def optimizer_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the Trainer's optimizer: tensors as ``PARAMETER/KEY``, the rest as plain JSON."""
    assert trainer.optimizer is not None
    names = _parameter_names(trainer)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, values in trainer.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"{names[number]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().contiguous()
            elif value is None or isinstance(value, (bool, int, float, str)):
                scalars[name] = value
            else:
                raise TrainingError(
                    f"optimizer state {name} is a {type(value).__name__}, which cannot be kept: "
                    "choose another optimizer, such as adamw_torch"
                )
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        for group in trainer.optimizer.state_dict()["param_groups"]
    ]
    return tensors, {"state": scalars, "groups": _plain(groups)}


def begin_with_optimizer(trainer: Trainer, directory: Path) -> None:
    """Give a fresh optimizer what another task's left in its state; learning rates stay its own.

    A parameter that has changed its shape, such as a head that grew, begins afresh.
    """
    content = open_state(directory)
    assert trainer.optimizer is not None
    own = trainer.optimizer.state_dict()
    shapes = {n: p.shape for n, p in _live_parameters(trainer).items()}
    kept = _tensors(directory / OPTIMIZER_FILE)
    changed = {
        name
        for name, value in ((key.rpartition("/")[0], value) for key, value in kept.items())
        if name not in shapes or (value.dim() and value.shape != shapes[name])
    }
    fitting = {k: v for k, v in kept.items() if k.rpartition("/")[0] not in changed}
    state = _indexed_state(trainer, fitting, content["optimizer"], partial=True)
    trainer.optimizer.load_state_dict({**own, "state": state})


def _indexed_state(
    trainer: Trainer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    *,
    partial: bool = False,
) -> dict[int, dict[str, Any]]:
    """State by parameter number, as the optimizer wants it."""
    numbers = {name: number for number, name in _parameter_names(trainer).items()}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars["state"]}.items():
        parameter, _, key = name.rpartition("/")
        if parameter in numbers:
            state.setdefault(numbers[parameter], {})[key] = value
        elif not partial:
            raise CheckpointError(
                f"the state holds {name}, which is no trained parameter of this model: "
                "it was saved while another model was trained"
            )
    return state


def _live_parameters(trainer: Trainer) -> dict[str, nn.Parameter]:
    return trained_parameters(trainer.accelerator.unwrap_model(trainer.model))


def _parameter_names(trainer: Trainer) -> dict[int, str]:
    """The optimizer's number of each parameter -> its name."""
    assert trainer.optimizer is not None
    names = {id(parameter): name for name, parameter in _live_parameters(trainer).items()}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {number: names[id(parameter)] for number, parameter in enumerate(parameters)}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of this process's random generators: tensors, and the numbers beside them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            tensors[f"cuda/{number}"] = torch.cuda.get_rng_state(number)
    numbers = {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}
    return tensors, numbers


def _without_functions(scheduler: Any) -> dict[str, Any]:
    """A schedule's state; its functions are made anew from the options."""
    state = dict(scheduler.state_dict())
    if "lr_lambdas" in state:
        state["lr_lambdas"] = [None] * len(state["lr_lambdas"])
    return state


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")
