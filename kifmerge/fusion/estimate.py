"""How long a planned work takes, at rates of disk and network that the user knows.

    seconds = downloads + max(disk, streams, processors) + sending

What overlaps counts once, by its slowest part. Nothing here measures the machine: what the
processors take is taken from measured runs, and each estimate says what it assumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kifmerge.errors import check_at_least
from kifmerge.fusion.fetching import Settled

# Nanoseconds of one core, measured with bfloat16 weights and float32 scores on the machine named
# here. tests/bench/plan_error.py measures them again.
MEASURED_ON = "AMD EPYC, November 2026"
# Per byte of the output: from float32 to its dtype, hashing, and the way to the disk.
WRITE_NS = 1.0
# Per byte of scores, each time that they are read: reading, and counting or comparing.
SCORE_NS = 0.2
# Per parameter of each model that is merged: reading it, its part of a base, and the rule; as torch
# computes it, and the compiled part.
MODEL_NS: Mapping[str, float] = {
    "linear": 1.3,
    "average": 1.7,
    "task-arithmetic": 1.7,
    "magmax": 2.2,
    "ties": 6.8,
    "recurrent-kif": 2.9,
    "recurrent-kif-adaptive": 3.8,
    "kif": 3.2,
    "kif-adaptive": 4.1,
}
COMPILED_MODEL_NS: Mapping[str, float] = {
    "linear": 0.6,
    "average": 0.9,
    "task-arithmetic": 0.8,
    "ties": 2.6,
    "recurrent-kif": 1.4,
}
# Per parameter of a model that is pruned.
PRUNE_NS = 3.0

_UNITS = ("bytes", "KB", "MB", "GB", "TB")


def model_ns(rule: str, *, is_compiled: bool) -> float:
    """Nanoseconds of one core per parameter of each model that is merged."""
    return (COMPILED_MODEL_NS if is_compiled else MODEL_NS)[rule]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What disk and network manage, in bytes a second; None where that is not known.

    Attributes:
        disk: reading and writing together.
        network: pulling, and sending.

    Raises:
        ValueError: less than a byte a second.
    """

    disk: int | None = None
    network: int | None = None

    def __post_init__(self) -> None:
        """Refuse rates at which nothing ends."""
        check_at_least(self, disk=1, network=1)

    def __bool__(self) -> bool:
        """Whether any is known."""
        return self.disk is not None or self.network is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a work asks of a machine.

    Attributes:
        disk_bytes: read from and written to the disk.
        streamed_bytes: pulled while they are used.
        downloaded_bytes: pulled before they are used.
        sent_bytes: of output files that each go to the Hub before the next is begun.
        processor_seconds: of one core.
        num_workers: that compute at the same time.
    """

    disk_bytes: int
    streamed_bytes: int
    downloaded_bytes: int
    sent_bytes: int
    processor_seconds: float
    num_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a work takes, start-up left out.

    Attributes:
        seconds: in all.
        bound_by: what takes the most of them.
        disk_seconds: of reading and writing; None without a rate.
        network_seconds: of pulling and sending; None without a rate.
        processor_seconds: of all workers at the same time.
        assumes: what has to hold, in words.
    """

    seconds: int
    bound_by: Literal["disk", "network", "processors"]
    disk_seconds: int | None
    network_seconds: int | None
    processor_seconds: int
    assumes: tuple[str, ...]


def estimate(load: Load, rates: Rates) -> Estimate:
    """How long a work takes at some rates.

    >>> load = Load(disk_bytes=3_000, streamed_bytes=0, downloaded_bytes=0, sent_bytes=0,
    ...             processor_seconds=4.0, num_workers=2)
    >>> found = estimate(load, Rates(disk=100))
    >>> found.seconds, found.bound_by, found.processor_seconds
    (30, 'disk', 2)
    """
    pulled_bytes = load.streamed_bytes + load.downloaded_bytes
    disk = _seconds(load.disk_bytes, rates.disk)
    network = _seconds(pulled_bytes + load.sent_bytes, rates.network)
    processors = load.processor_seconds / max(load.num_workers, 1)
    overlapping = max(disk, _seconds(load.streamed_bytes, rates.network), processors)
    alone = _seconds(load.downloaded_bytes + load.sent_bytes, rates.network)
    shares: dict[Literal["disk", "network", "processors"], float] = {
        "disk": disk,
        "network": network,
        "processors": processors,
    }
    return Estimate(
        seconds=_rounded(overlapping + alone),
        bound_by=max(shares, key=shares.__getitem__),
        disk_seconds=None if rates.disk is None else _rounded(disk),
        network_seconds=None if rates.network is None else _rounded(network),
        processor_seconds=_rounded(processors),
        assumes=tuple(_assumptions(load, rates)),
    )


def network_load(settled: Sequence[Settled]) -> tuple[int, int]:
    """Bytes that are streamed, and that are downloaded, of inputs on the Hub."""
    streamed = sum(s.pulled_bytes for s in settled if s.fetch == "stream")
    return streamed, sum(s.pulled_bytes for s in settled if s.fetch == "download")


def _assumptions(load: Load, rates: Rates) -> Iterator[str]:
    if rates.disk is None:
        yield "a disk that keeps up: no --disk-rate is given"
    else:
        moved = f"{_shown(load.disk_bytes)} read and written at {_shown(rates.disk)} a second"
        yield f"disk: {moved}, nothing cached"
    pulled_bytes = load.streamed_bytes + load.downloaded_bytes
    on_network = [
        f"{_shown(num_bytes)} {what}"
        for num_bytes, what in ((pulled_bytes, "pulled"), (load.sent_bytes, "sent"))
        if num_bytes
    ]
    if on_network and rates.network is None:
        yield f"not counted, since no --network-rate is given: {' and '.join(on_network)}"
    elif on_network and rates.network is not None:
        yield f"network: {' and '.join(on_network)} at {_shown(rates.network)} a second"
    workers = f"{load.num_workers} workers" if load.num_workers > 1 else "one worker"
    yield f"processors: {workers}, each alone on a core like the one measured ({MEASURED_ON})"


def _seconds(num_bytes: int, rate: int | None) -> float:
    return 0.0 if rate is None else num_bytes / rate


def _rounded(seconds: float) -> int:
    return max(round(seconds), 1) if seconds else 0


def _shown(num_bytes: int) -> str:
    """A size in the unit that keeps it short.

    >>> _shown(500_000_000), _shown(1_368_979_721_216)
    ('500 MB', '1.37 TB')
    """
    power = min((len(str(num_bytes)) - 1) // 3, len(_UNITS) - 1)
    size = num_bytes / 1000**power
    return f"{size:.0f} {_UNITS[power]}" if size >= 100 else f"{size:.3g} {_UNITS[power]}"
