"""How weights on the Hub are read: brought into the cache, or streamed, and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from kifmerge.checkpoint.digest import CHECKPOINT_STEMS
from kifmerge.checkpoint.source import FolderSource
from kifmerge.hub.folder import HubFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is going to be read of a source.

    Attributes:
        source: the tensors.
        names: of those that are read, in the order in which they are.
        num_passes: how often.
    """

    source: FolderSource
    names: Sequence[str]
    num_passes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a folder on the Hub is read.

    Attributes:
        reference: pinned.
        fetch: ``download``, ``stream``, or ``cache`` where all of it is here already.
        reason: for the user.
        pulled_bytes: that come over the network.
    """

    reference: str
    fetch: Literal["download", "stream", "cache"]
    reason: str
    pulled_bytes: int

    def __str__(self) -> str:
        return f"{self.reference}: {self.fetch}, {self.reason}"


def settle(
    readings: Iterable[Reading], *, write_bytes: int = 0, spare_disk: bool = False
) -> list[Settled]:
    """Choose how each folder on the Hub is read where the user left it open, and prepare for it.

    A folder that is read whole and more than once is downloaded; what is read in part, or does not
    fit on the disk, is streamed.

    Args:
        readings: of all inputs; those on this disk are left alone.
        write_bytes: that the disk must have room for beside downloads.
        spare_disk: stream models, and what is read once, so that no whole model is on the disk.
    """
    of_folder: dict[HubFolder, list[Reading]] = {}
    for reading in readings:
        if isinstance(reading.source.directory, HubFolder):
            of_folder.setdefault(reading.source.directory, []).append(reading)
    room_bytes = _free_bytes() - write_bytes
    found = []
    for folder, of_this in of_folder.items():
        settled = _settled(folder, of_this, room_bytes, spare_disk=spare_disk)
        if settled.fetch == "download":
            room_bytes -= settled.pulled_bytes
        if settled.fetch != "cache":
            folder.settle(settled.fetch)
        for reading in of_this:
            reading.source.expect(reading.names)
        found.append(settled)
    return found


def _settled(
    folder: HubFolder, readings: Sequence[Reading], room_bytes: int, *, spare_disk: bool
) -> Settled:
    missing = {
        name
        for reading in readings
        for name, held in reading.source.files.items()
        if not folder.open(name).is_here and not {*held}.isdisjoint(reading.names)
    }
    whole_bytes = sum(folder.files[name].size for name in missing)
    needed_bytes = sum(reading.num_passes * _num_bytes(reading, missing) for reading in readings)
    if not missing:
        return Settled(
            reference=str(folder), fetch="cache", reason="all of it is there", pulled_bytes=0
        )
    fetch, reason = folder.fetch, "as asked"
    if fetch == "auto":
        fetch, reason = _chosen(readings, whole_bytes, room_bytes, spare_disk=spare_disk)
    return Settled(
        reference=str(folder),
        fetch="stream" if fetch == "stream" else "download",
        reason=reason,
        pulled_bytes=needed_bytes if fetch == "stream" else whole_bytes,
    )


def _chosen(
    readings: Sequence[Reading], whole_bytes: int, room_bytes: int, *, spare_disk: bool
) -> tuple[Literal["download", "stream"], str]:
    num_passes = sum(reading.num_passes for reading in readings)
    times = "once" if num_passes == 1 else f"{num_passes} times"
    in_order = all(map(_is_in_order, readings))
    if spare_disk and (num_passes == 1 or readings[0].source.stem in CHECKPOINT_STEMS):
        return "stream", f"no model is kept on this disk; it is pulled {times}"
    if num_passes == 1 and in_order:
        (reading,) = readings
        if len(reading.names) < len(reading.source.names()):
            needed = f"{len(reading.names)} of {len(reading.source.names())} tensors"
            return "stream", f"only {needed} are needed"
    if whole_bytes > room_bytes:
        return "stream", (
            f"the disk of the cache has {max(room_bytes, 0) / 1e9:.2f} GB for its "
            f"{whole_bytes / 1e9:.2f} GB; it is pulled {times}"
        )
    if num_passes > 1:
        return "download", f"it is read {times}"
    if not in_order:
        return "download", "it is read in another order than it is stored in"
    return "download", "all of it is needed, and the disk of the cache has room"


def _is_in_order(reading: Reading) -> bool:
    """Whether each file is read in its own order, so that a stream of it can be hashed."""
    place = {name: n for n, name in enumerate(reading.names)}
    for held in reading.source.files.values():
        places = [place[name] for name in held if name in place]
        if places != sorted(places):
            return False
    return True


def _num_bytes(reading: Reading, files: Iterable[str]) -> int:
    wanted = frozenset(reading.names)
    source = reading.source
    return sum(
        source.info(name).nbytes for file in files if file in source.files
        for name in source.files[file] if name in wanted
    )  # fmt: skip


def _free_bytes() -> int:
    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return shutil.disk_usage(existing).free
