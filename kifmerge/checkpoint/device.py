"""Accelerators: what is fused there comes from the files, and goes back to them, in pieces.

Each worker has a stream of its own, so that one copies while another computes.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

# Of a piece as float32: so much work for one launch of a kernel that launching does not matter.
DEVICE_PIECE_BYTES = 1 << 24

_of_thread = threading.local()


def find_device(name: str, local_rank: int = 0) -> torch.device | None:
    """The accelerator that a name stands for; None for the processor.

    Args:
        name: ``cpu``, ``cuda``, or ``cuda:1`` and so on.
        local_rank: of this process on its machine: each takes another of its accelerators.

    Raises:
        ValueError: there is none of that name.

    >>> find_device("cpu") is None
    True
    """
    if name == "cpu":
        return None
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count()
    index = int(number) if number.isdecimal() else local_rank % max(count, 1)
    if kind != "cuda" or not (number.isdecimal() or name == kind):
        raise ValueError(f"expected cpu, cuda or cuda:NUMBER, found {name}")
    if index >= count:
        raise ValueError(f"{name}: this machine has {count} CUDA devices that torch can use")
    return torch.device("cuda", index)


def send(values: Tensor, device: torch.device | None) -> Tensor:
    """Values on a device, through page-locked memory: nobody waits until they are there.

    Args:
        values: to be sent.
        device: None leaves them where they are.
    """
    if device is None or values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def own_stream(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """What this thread asks of an accelerator need not wait for what other threads ask of it."""
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    streams: dict[str, Any] = _of_thread.__dict__
    if str(device) not in streams:
        streams[str(device)] = torch.cuda.Stream(device)
    return torch.cuda.stream(streams[str(device)])
