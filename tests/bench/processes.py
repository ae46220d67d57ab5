"""What a command costs: wall and CPU seconds, peak memory, bytes read; measured from outside.

The clock runs until what the command wrote is on the disk. A process that measures must stay small
and import no torch: Linux counts the memory of the one that starts a process in its child's peak.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

SAMPLES_PER_SECOND = 20
_SHOWN_BYTES = 2000
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run.

    Attributes:
        wall: seconds from start until the output is on the disk.
        cpu: user and system seconds, of the flush to the disk too.
        peak_rss: bytes, mapped files included.
        peak_anon: bytes of memory of its own, the largest of 20 samples a second.
        peak_disk: bytes of the folders watched, the largest of 20 samples a second.
        read_bytes: what it asked the system to read; mapped files are not counted.
        written_bytes: what it asked the system to write; mapped files are not counted.
        load: processes that wanted a core in the last minute, when it began.
    """

    wall: float
    cpu: float
    peak_rss: int
    peak_anon: int
    peak_disk: int
    read_bytes: int
    written_bytes: int
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command to measure.

    Attributes:
        name: in the table.
        command: and its arguments.
        out: folder that it makes, removed before and after; None if it makes none.
        inputs: folders that it reads, brought into the page cache first.
        weight_bytes: of tensors that ``out`` must hold in the end.
        environment: further variables.
        watched: folders whose size is looked at.
        check: a command that fails where ``out`` is not what it should be; run in the first round.
        most_rounds: that it is run in; None for all.
    """

    name: str
    command: Sequence[str | Path]
    out: Path | None = None
    inputs: Sequence[Path] = ()
    weight_bytes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    watched: Sequence[Path] = ()
    check: Sequence[str | Path] = ()
    most_rounds: int | None = None


def measure(job: Job, log_path: Path, *, checked: bool = False) -> Cost:
    """Run once; ``checked`` looks at what was written, too.

    Raises:
        SystemExit: the command failed, did not write all tensors, or wrote wrong ones.
    """
    if job.out is not None:
        shutil.rmtree(job.out, ignore_errors=True)
    for folder in job.inputs:
        _read_all(folder)
    os.sync()
    load = os.getloadavg()[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= job.environment
    with log_path.open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in job.command], stdout=log, stderr=log, env=environment
        )
        sampler = _Sampler(process.pid, job.watched)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its counters stay to be read
        sampler.stop()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        flush_started = time.process_time()
        if job.out is not None and process.returncode == 0:
            _flush(job.out)
        flush_seconds = time.process_time() - flush_started
        wall = time.perf_counter() - started
    if process.returncode:
        text = log_path.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")
        raise SystemExit(f"{job.name} failed with exit code {process.returncode}:\n{text}")
    if job.out is not None:
        found = weight_bytes(job.out)
        if job.weight_bytes is not None and found != job.weight_bytes:
            raise SystemExit(f"{job.name}: expected {job.weight_bytes} bytes, found {found}")
        if checked and job.check:
            _check(job)
        shutil.rmtree(job.out)
    return Cost(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime + flush_seconds,
        peak_rss=usage.ru_maxrss * 1024,
        peak_anon=sampler.peak_anon,
        peak_disk=sampler.peak_disk,
        read_bytes=sampler.read_bytes,
        written_bytes=sampler.written_bytes,
        load=load,
    )


def _check(job: Job) -> None:
    done = subprocess.run(
        [str(word) for word in job.check], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{job.name}: its output is wrong:\n{done.stdout}{done.stderr}")


def measure_in_turn(
    jobs: Sequence[Job],
    repeats: int,
    work: Path,
    *,
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, list[Cost]]:
    """Run all jobs, then all again: what disturbs the machine for a while disturbs all of them.

    Jobs of one name are one: what is short is listed, and run, several times a round.
    """
    costs: dict[str, list[Cost]] = {job.name: [] for job in jobs}
    package = importlib.util.find_spec("kifmerge")
    assert package is not None
    assert package.origin is not None
    compileall.compile_dir(Path(package.origin).parent, quiet=2)  # as pip does it
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number in range(1, repeats + 1):
        before_round()
        for job in jobs:
            if job.most_rounds is not None and number > job.most_rounds:
                continue
            log = logs / f"{job.name.replace(' ', '-')}.txt"
            cost = measure(job, log, checked=number == 1)
            costs[job.name].append(cost)
            print(
                f"round {number}: {job.name}: {cost.wall:.2f} s wall, {cost.cpu:.2f} s CPU, "
                f"{cost.peak_rss / 1e6:.0f} MB, load {cost.load:.1f}",
                file=sys.stderr,
                flush=True,
            )
    return costs


class _Sampler:
    """Looks at a process, without descendants, until stopped."""

    def __init__(self, process_id: int, watched: Sequence[Path]) -> None:
        self.peak_anon = 0
        self.peak_disk = 0
        self._watched = watched
        self.read_bytes = 0
        self.written_bytes = 0
        self._folder = Path(f"/proc/{process_id}")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        """Once the process has ended, and before it is waited for."""
        self._stopped.set()
        self._thread.join()
        moved = _fields((self._folder / "io").read_text())
        self.read_bytes, self.written_bytes = int(moved["rchar"]), int(moved["wchar"])

    def _look(self) -> None:
        while not self._stopped.wait(1 / SAMPLES_PER_SECOND):
            status = _fields((self._folder / "status").read_text())
            # One that has ended has no memory any more, and does not say so.
            self.peak_anon = max(self.peak_anon, 1024 * int(status.get("RssAnon", "0").split()[0]))
            self.peak_disk = max(self.peak_disk, sum(map(_disk_bytes, self._watched)))


def _disk_bytes(folder: Path) -> int:
    """Of a folder whose files come and go."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _read_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_BLOCK_BYTES):
                    pass


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def weight_bytes(folder: Path) -> int:
    """Bytes of the tensors of all safetensors files in a folder, headers not counted."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header_bytes
    return total


def check_disk(work: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < needed_bytes:
        raise SystemExit(
            f"{work}: expected {needed_bytes / 1e9:.1f} GB free, found {free / 1e9:.1f} GB"
        )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    facts = _fields(Path("/proc/cpuinfo").read_text())
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def medians(costs: Sequence[Cost]) -> dict[str, float]:
    return {
        name: statistics.median(getattr(cost, name) for cost in costs)
        for name in Cost.__dataclass_fields__
    }


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """In Markdown: columns of the first row's names, the first to the left, others to the right."""
    first, *others = columns = list(rows[0])
    widths = {c: max(3, len(c), *(len(row.get(c, "")) for row in rows)) for c in columns}

    def line(cells: Mapping[str, str]) -> str:
        shown = [cells.get(first, "").ljust(widths[first])]
        shown += [cells.get(column, "").rjust(widths[column]) for column in others]
        return f"| {' | '.join(shown)} |"

    print(line(dict(zip(columns, columns, strict=True))))
    print(line({first: "-" * widths[first], **{c: "-" * (widths[c] - 1) + ":" for c in others}}))
    for row in rows:
        print(line(row))


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON: when, where and with what it was measured, and ``content``."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = {name: metadata.version(name) for name in ("kifmerge", "torch", "safetensors")}
    about = {"date": now, "machine": machine(), "versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **content}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path} holds all of this")
