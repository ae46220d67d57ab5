"""The trained parameters of a live model, and how its checkpoints name them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kifmerge.errors import TrainingError
from kifmerge.tensor.sharding import is_sharded


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` by name, tied ones once, compile's prefix taken off.

    Those of a model under ``fully_shard`` (FSDP2) are DTensors: the model is resharded first, since
    a forward pass alone leaves some of it gathered.

    Raises:
        TrainingError: there are none, or they are views of FSDP1's flat parameters.
    """
    reshard(model)
    parameters = {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not parameters:
        raise TrainingError("the model has no trainable parameter: every one is frozen")
    for name in parameters:
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise TrainingError(
                f"{name} belongs to FSDP1 (FullyShardedDataParallel), which joins parameters into "
                "flat ones: shard the model with torch.distributed.fsdp.fully_shard (FSDP2, in the "
                "Trainer fsdp_config version 2), or use plain data parallelism (DDP)"
            )
    return parameters


def reshard(model: nn.Module) -> None:
    """Let go of what ``fully_shard`` has gathered of a model; nothing where it is not sharded."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> its name in the files that ``save_pretrained`` writes, one to one.

    The two differ for PEFT adapters, whose files leave out the adapter's name. For families that
    are saved in other pieces see :func:`as_in_checkpoint`.
    """
    parameters = trained_parameters(model)
    if not hasattr(model, "peft_config"):
        return {name: name for name in parameters}
    from peft import get_peft_model_state_dict

    if any(is_sharded(parameter) for parameter in parameters.values()):
        names = adapter_names(model)
        return {name: names.get(name, name) for name in parameters}
    saved = {
        (tensor.data_ptr(), tensor.numel()): name
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    return {
        name: saved.get((parameter.data_ptr(), parameter.numel()), name)
        for name, parameter in parameters.items()
    }


def adapter_names(model: nn.Module) -> dict[str, str]:
    """Name of each tensor of a PEFT adapter -> its name in the files; no values are looked at."""
    from peft import get_peft_model_state_dict

    # Told apart as objects: what is sharded has no address of its own.
    marks = {name: torch.empty(v.shape, device="meta") for name, v in model.state_dict().items()}
    in_files = {id(m): n for n, m in get_peft_model_state_dict(model, state_dict=marks).items()}
    return {
        name.replace("_orig_mod.", ""): in_files[id(mark)]
        for name, mark in marks.items()
        if id(mark) in in_files
    }


def as_in_checkpoint(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values per parameter under the names, and in the pieces, of the checkpoint's own files.

    Some families are saved otherwise than they live in memory: stacked experts one by one.
    """
    if hasattr(model, "peft_config"):
        names = checkpoint_names(model)
        return {names[name]: value for name, value in values.items()}
    if not isinstance(model, PreTrainedModel):
        return dict(values)
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    return saved
