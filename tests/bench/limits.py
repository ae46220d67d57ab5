"""How fast this machine moves bytes: what no merge can beat.

    python tests/bench/limits.py WORK [--size 1.0]

Measured on one core, with nothing but the call that is named, in pieces of 1 MB that stay in the
cache of the core, as the pieces of a merge do. Rates are in bytes per second:

    read     pread of a file in the page cache
    write    pwrite into the page cache: CPU seconds, the flush to the disk not counted
    disk     the same until it is on the disk: wall seconds of writing, and fsync
    copy     from memory to memory, through buffers far larger than the caches
    xxh3     XXH3-128, the digest of what a merge reads
    sha256   the digest of what it writes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

PIECE_BYTES = 1 << 20
COPIED_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes per second, of one core; ``disk`` of wall time, the others of CPU time."""

    read: float
    write: float
    disk: float
    copy: float
    xxh3: float
    sha256: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least that moving some bytes takes at given rates.

    Attributes:
        cpu: seconds to read, to look at all that is read and written once, to digest and to write.
        disk: seconds to bring what is written onto the disk.
        wall: seconds, if all cores share ``cpu`` evenly and nothing waits for the disk but the end.
    """

    cpu: float
    disk: float
    wall: float


def floor_of(
    rates: Rates, *, read_bytes: float, input_bytes: float, written_bytes: float, cores: int
) -> Floor:
    """``input_bytes``: digested, however often they are read.

    >>> rates = Rates(read=4.0, write=2.0, disk=1.0, copy=5.0, xxh3=10.0, sha256=1.0)
    >>> floor_of(rates, read_bytes=20, input_bytes=20, written_bytes=10, cores=2)
    Floor(cpu=25.0, disk=10.0, wall=12.5)
    """
    cpu = (
        read_bytes / rates.read
        + (read_bytes + written_bytes) / 2 / rates.copy
        + input_bytes / rates.xxh3
        + written_bytes / rates.sha256
        + written_bytes / rates.write
    )
    disk = written_bytes / rates.disk
    return Floor(cpu=cpu, disk=disk, wall=max(cpu / cores, disk))


def median_rates(found: Sequence[Rates]) -> Rates:
    """Of several measurements."""
    names = Rates.__dataclass_fields__
    return Rates(**{name: statistics.median(getattr(r, name) for r in found) for name in names})


def measure_rates(work: Path, size_bytes: int) -> Rates:
    """In a process of its own, so that its buffers are no part of what measures others."""
    command = [sys.executable, __file__, str(work), "--size", str(size_bytes / 1e9), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Rates(**json.loads(done.stdout))


def _measure_here(work: Path, size_bytes: int) -> Rates:
    num_pieces = max(size_bytes // PIECE_BYTES, 1)
    num_bytes, piece = num_pieces * PIECE_BYTES, bytearray(os.urandom(PIECE_BYTES))
    path = work / "limits.bin"
    work.mkdir(parents=True, exist_ok=True)
    os.sync()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    places = range(0, num_bytes, PIECE_BYTES)

    def write() -> None:
        for place in places:
            os.pwrite(descriptor, piece, place)

    def read() -> None:
        for place in places:
            os.preadv(descriptor, [piece], place)

    def repeated(digest: Callable[[bytes], None]) -> Callable[[], None]:
        return lambda: [digest(piece) for _ in range(num_pieces)] and None

    try:
        for _ in range(2):  # the first one may take memory that a virtual machine has yet to get
            os.ftruncate(descriptor, 0)
            os.fsync(descriptor)
            started = time.perf_counter()
            write_seconds = _cpu_seconds(write)
            os.fsync(descriptor)
            disk_seconds = time.perf_counter() - started
        read()
        read_seconds = _cpu_seconds(read)
    finally:
        os.close(descriptor)
        path.unlink()
    copied_bytes = min(COPIED_BYTES, num_bytes)
    source, target = (memoryview(bytearray(copied_bytes)) for _ in range(2))

    def copy() -> None:
        target[:] = source

    copy()
    return Rates(
        read=num_bytes / read_seconds,
        write=num_bytes / write_seconds,
        disk=num_bytes / disk_seconds,
        copy=copied_bytes / _cpu_seconds(copy),
        xxh3=num_bytes / _cpu_seconds(repeated(xxhash.xxh3_128().update)),
        sha256=num_bytes / _cpu_seconds(repeated(hashlib.sha256().update)),
    )


def _cpu_seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return max(time.process_time() - started, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=float, default=1.0, help="GB read and written")
    parser.add_argument("--json", action="store_true", help="print it")
    arguments = parser.parse_args()
    rates = asdict(_measure_here(arguments.work, round(arguments.size * 1e9)))
    if arguments.json:
        print(json.dumps(rates))
        return
    for name, rate in rates.items():
        print(f"{name:>8}: {rate / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
