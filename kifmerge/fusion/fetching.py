"""How weights on the Hub are read: brought into the cache, or streamed, and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from kifmerge.checkpoint.digest import CHECKPOINT_STEMS
from kifmerge.checkpoint.source import FolderSource
from kifmerge.hub.client import Say, silent
from kifmerge.hub.folder import HubFolder
from kifmerge.hub.stream import shared_block_bytes, stream_bytes

# A few small tensors that are read again do not matter.
_ABOUT_ONCE = 1.005
_AS_ASKED = "as asked"


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
        buffer_bytes: of memory that a stream of it takes.
        say: that the user hears what was chosen for him.
    """

    reference: str
    fetch: Literal["download", "stream", "cache"]
    reason: str
    pulled_bytes: int
    buffer_bytes: int = 0
    say: Say = field(default=silent, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.reference}: {self.fetch}, {self.reason}"


def settle(
    readings: Iterable[Reading], *, write_bytes: int = 0, spare_disk: bool = False
) -> list[Settled]:
    """Choose how each folder on the Hub is read where the user left it open, and prepare for it.

    What is read in part, or does not fit on the disk, is streamed; all else is downloaded.

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
    found: dict[HubFolder, Settled] = {}
    for folder, of_this in of_folder.items():
        found[folder] = _settled(folder, of_this, room_bytes, spare_disk=spare_disk)
        if found[folder].fetch == "download":
            room_bytes -= found[folder].pulled_bytes
    streamed = [folder for folder, settled in found.items() if settled.fetch == "stream"]
    for folder in streamed:
        folder.shelf.block_bytes = shared_block_bytes(len(streamed))
        files = {name for reading in of_folder[folder] for name in reading.source.files}
        num_bytes = sum(folder.files[name].size for name in files)
        buffer_bytes = stream_bytes(num_bytes, folder.shelf.block_bytes)
        found[folder] = replace(found[folder], buffer_bytes=buffer_bytes)
    for folder, settled in found.items():
        if settled.fetch != "cache":
            folder.settle(settled.fetch)
        for reading in of_folder[folder]:
            reading.source.expect(reading.names)
    return list(found.values())


def tell(found: Iterable[Settled]) -> None:
    """Say how folders are read and why, but for what the user asked for and what is here."""
    for settled in found:
        if settled.fetch != "cache" and settled.reason != _AS_ASKED:
            settled.say(str(settled))


def _settled(
    folder: HubFolder, readings: Sequence[Reading], room_bytes: int, *, spare_disk: bool
) -> Settled:
    missing = {
        name
        for reading in readings
        for name, held in reading.source.files.items()
        if not folder.open(name).is_here and not {*held}.isdisjoint(reading.names)
    }
    if not missing:
        return Settled(
            reference=str(folder), fetch="cache", reason="all of it is there", pulled_bytes=0
        )
    need = _Need.of(readings, missing, sum(folder.files[name].size for name in missing))
    fetch, reason = folder.fetch, _AS_ASKED
    if fetch == "auto":
        fetch, reason = need.choose(room_bytes, spare_disk=spare_disk)
    return Settled(
        reference=str(folder),
        fetch="stream" if fetch == "stream" else "download",
        reason=reason,
        pulled_bytes=need.streamed_bytes if fetch == "stream" else need.whole_bytes,
        say=folder.say,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """What is needed of the files of a folder that are not here.

    Attributes:
        whole_bytes: size of the files.
        num_tensors: in them.
        num_needed: of those, that are read.
        needed_bytes: of these.
        streamed_bytes: of all that is read, each time that it is.
        is_in_order: whether each file is read in its own order, so that its stream can be hashed.
        is_model: whether it is a checkpoint, rather than what is known of one.
    """

    whole_bytes: int
    num_tensors: int
    num_needed: int
    needed_bytes: int
    streamed_bytes: int
    is_in_order: bool
    is_model: bool

    @classmethod
    def of(cls, readings: Sequence[Reading], missing: Iterable[str], whole_bytes: int) -> _Need:
        held: dict[str, int] = {}
        needed: dict[str, dict[str, int]] = {}
        streamed_bytes = 0
        for reading in readings:
            source, wanted = reading.source, frozenset(reading.names)
            for file in source.files.keys() & missing:
                read = {n: source.info(n).nbytes for n in source.files[file] if n in wanted}
                held[file] = len(source.files[file])
                needed.setdefault(file, {}).update(read)
                streamed_bytes += reading.num_passes * sum(read.values())
        return cls(
            whole_bytes=whole_bytes,
            num_tensors=sum(held.values()),
            num_needed=sum(map(len, needed.values())),
            needed_bytes=sum(sum(sizes.values()) for sizes in needed.values()),
            streamed_bytes=streamed_bytes,
            is_in_order=all(map(_is_in_order, readings)),
            is_model=readings[0].source.stem in CHECKPOINT_STEMS,
        )

    @property
    def _times(self) -> str:
        """How often what is needed is read, in words."""
        times = self.streamed_bytes / self.needed_bytes if self.needed_bytes else 1.0
        return "once" if times < _ABOUT_ONCE else f"{times:.3g} times"

    def choose(
        self, room_bytes: int, *, spare_disk: bool
    ) -> tuple[Literal["download", "stream"], str]:
        """How to read, and why."""
        times = self._times
        if spare_disk and (self.is_model or (times == "once" and self.is_in_order)):
            return "stream", f"no model is kept on this disk; it is pulled {times}"
        if self.num_needed < self.num_tensors and self.streamed_bytes < self.whole_bytes:
            needed = f"{self.num_needed} of {self.num_tensors} tensors"
            return "stream", f"only {needed} are needed"
        if self.whole_bytes > room_bytes:
            return "stream", (
                f"the disk of the cache has {max(room_bytes, 0) / 1e9:.2f} GB for its "
                f"{self.whole_bytes / 1e9:.2f} GB; it is pulled {times}"
            )
        if times != "once":
            return "download", f"it is read {times}"
        if not self.is_in_order:
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


def _free_bytes() -> int:
    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return shutil.disk_usage(existing).free
