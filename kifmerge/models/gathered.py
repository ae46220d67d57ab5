"""What a sharded model holds, as parts of files that all of its processes write together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kifmerge.checkpoint.gathering import Part, write_parts
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.holders import holders_of
from kifmerge.errors import TrainingError
from kifmerge.models.parameters import (
    adapter_names,
    as_in_checkpoint,
    checkpoint_names,
    reshard,
)
from kifmerge.models.saved_names import SavedGroup, saved_groups
from kifmerge.tensor.sharding import gathered


def gathered_parts(
    model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float32
) -> list[Part]:
    """Tensors ``KIND/NAME`` of parameters, NAME as in the model, under the names of its files.

    An empty KIND is left out in the files, with its slash.

    Args:
        model: with the parameters.
        state: sharded as they are.
        dtype: in the files; None: each tensor's own.
    """
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = value
    return [
        _part(model, values, kind, group, dtype)
        for kind, values in kinds.items()
        for group in _groups(model, values)
    ]


def _groups(model: nn.Module, values: Mapping[str, Tensor]) -> list[SavedGroup]:
    if hasattr(model, "peft_config"):
        in_files = checkpoint_names(model)
        return [SavedGroup(parameters=(n,), names={n: (in_files[n],)}) for n in values]
    empty = {name: torch.empty(value.shape, device="meta") for name, value in values.items()}
    return saved_groups(model, empty, None)


def _part(
    model: nn.Module,
    values: Mapping[str, Tensor],
    kind: str,
    group: SavedGroup,
    dtype: torch.dtype | None,
) -> Part:
    def in_files(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their keys in the files, from those by their names in the model."""
        if group.is_converted:
            whole = as_in_checkpoint(model, whole)
        else:
            whole = dict(zip(group.names, whole.values(), strict=True))
        return {
            f"{kind}/{name}" if kind else name: whole[saved]
            for saved, of in group.names.items()
            for name in of
        }

    shapes = {n: torch.empty(values[n].shape, device="meta") for n in group.parameters}
    kept_as = dtype or values[group.parameters[0]].dtype
    return Part(
        infos={k: TensorInfo(kept_as, tuple(v.shape)) for k, v in in_files(shapes).items()},
        gather=lambda: in_files({name: gathered(values[name]) for name in group.parameters}),
    )


def write_checkpoint(directory: Path, model: nn.Module) -> None:
    """Write a sharded model as ``save_pretrained`` would a whole one; of an adapter, that alone.

    All processes call it together, between two steps; each writes a part of a model's files. No
    process ever holds more than a tensor or two whole.

    Args:
        directory: that all processes see; made if need be.
        model: a transformers model, or a PEFT one, under ``fully_shard``.

    Raises:
        TrainingError: a model that is not sharded, or of neither library.
        CheckpointError: a process could not write.
    """
    reshard(model)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    ranks = holders_of(tensors)
    if ranks.size == 1 or not hasattr(model, "save_pretrained"):
        raise TrainingError(
            f"{type(model).__name__}: expected a transformers or PEFT model under fully_shard; one "
            "that is whole is written by its own save_pretrained"
        )
    if hasattr(model, "peft_config"):
        in_files = {n: f for n, f in adapter_names(model).items() if n in tensors}
        parts = parts_as_named({file: tensors[name] for name, file in in_files.items()})
        write_parts(directory, "adapter_model", parts, ranks, most_files=1)
        if ranks.is_first:
            _write_adapter_config(directory, model)
    else:
        kept = model.state_dict()
        tensors |= {name: value for name, value in model.named_buffers() if name in kept}
        parts = gathered_parts(model, {f"/{n}": value for n, value in tensors.items()}, None)
        write_parts(directory, "model", parts, ranks)
        if ranks.is_first:
            _write_config(directory, model)
    ranks.meet()


def _write_adapter_config(directory: Path, model: Any) -> None:
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    config.save_pretrained(directory)


def _write_config(directory: Path, model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def parts_as_named(state: Mapping[str, Tensor]) -> list[Part]:
    """Tensors under their own names, each a part."""

    def part(key: str, value: Tensor) -> Part:
        return Part(
            infos={key: TensorInfo(value.dtype, tuple(value.shape))},
            gather=lambda: {key: gathered(value)},
        )

    return [part(key, value) for key, value in state.items()]
