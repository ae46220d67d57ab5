"""Faults on purpose: which request goes wrong, and how."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from loopback.log import KINDS, Row

BEFORE = ("status", "reset", "expire")  # instead of an answer, or of its arrival
RANGES = ("ignore_range", "wrong_range")  # another part than the one asked for
BODY = ("truncate_at", "reset_at", "corrupt_at", "corrupt_file_at", "stall_at", "rate")
ACTS = BEFORE + RANGES + BODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, with which requests: exactly one of the acts.

    ``match`` is a glob over the path, the file, or repository/file of a request (``*`` crosses
    slashes); ``kind`` and ``method`` as in the log. The first ``skip`` requests that the fault
    could act on pass, the next ``times`` are hit (None: all). Of several faults that could act
    on a request the one added first does, and later ones do not count that request.

    A fault of a body waits for an answer that has such a body: one with that offset, or a part
    asked for with Range. With an upload (kind ``put``) it acts on the body that is received.
    """

    match: str = "*"
    kind: str | None = None
    method: str | None = None
    skip: int = 0
    times: int | None = 1
    # Acts on the request.
    status: int | None = None  # this answer, with a Retry-After header if asked for
    retry_after: float | None = None
    reset: bool = False  # TCP reset, no answer
    after_act: bool = False  # with status and reset: first do what was asked, then so
    expire: bool = False  # the CDN's 403 for a signature that has expired, for good
    # Acts on the range.
    ignore_range: bool = False  # 200 with the whole file
    wrong_range: bool = False  # 206 with another part
    # Acts on the body. Offsets count in the body, in bytes.
    truncate_at: int | None = None  # cut there, connection closed cleanly
    reset_at: int | None = None  # cut there with a TCP reset
    corrupt_at: int | None = None  # this byte of the body flipped
    corrupt_file_at: int | None = None  # this byte of the file flipped, whatever the range
    stall_at: int | None = None  # nothing for stall_seconds from there on
    stall_seconds: float = 0.0
    rate: float | None = None  # bytes per second

    def __post_init__(self) -> None:
        acts = [act for act in ACTS if self.has(act)]
        if len(acts) != 1:
            raise ValueError(f"a fault is one of {', '.join(ACTS)}, not {acts}")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.after_act and self.act not in ("status", "reset"):
            raise ValueError(f"after_act goes with status and reset, not with {self.act}")

    def has(self, act: str) -> bool:
        value = getattr(self, act)
        return value is not None and value is not False

    @property
    def act(self) -> str:
        return next(act for act in ACTS if self.has(act))

    @property
    def name(self) -> str:
        """What the log says: ``status 503``, ``reset``, ``truncate_at 4096``."""
        value = getattr(self, self.act)
        lost = " after act" if self.after_act else ""
        return (self.act if value is True else f"{self.act} {value}") + lost

    def concerns(self, row: Row) -> bool:
        return (
            (self.kind is None or self.kind == row.kind)
            and (self.method is None or self.method == row.method)
            and row.matches(self.match)
        )

    def reaches(self, start: int, stop: int) -> bool:
        """Whether this fault of a body shows in a body that is bytes [start, stop) of a file."""
        if self.act == "corrupt_file_at":
            return self.corrupt_file_at is not None and start <= self.corrupt_file_at < stop
        offset = 0 if self.act == "rate" else getattr(self, self.act)
        return offset < stop - start

    def flipped(self, start: int) -> int | None:
        """Offset in a body, which begins at byte ``start`` of its file, of the flipped byte."""
        if self.corrupt_file_at is not None:
            return self.corrupt_file_at - start
        return self.corrupt_at


class _Counted:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.seen = 0

    def take(self) -> bool:
        self.seen += 1
        hit = self.seen - self.fault.skip
        return hit >= 1 and (self.fault.times is None or hit <= self.fault.times)


class Faults:
    """The faults that are set, with how often each has acted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[_Counted] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._all.append(_Counted(fault))

    def clear(self) -> None:
        with self._lock:
            self._all = []

    def before(self, row: Row) -> Fault | None:
        """Return the fault that answers instead of, or after, the act."""
        acts = ("status", "reset", *(("expire",) if row.listener == "cdn" else ()))
        return self._take(row, acts, 0, 0)

    def of_range(self, row: Row) -> Fault | None:
        """Return the fault of a part that was asked for."""
        return self._take(row, RANGES, 0, 0)

    def of_body(self, row: Row, start: int, stop: int) -> Fault | None:
        """Return the fault of a body that is bytes [start, stop) of a file, or of an answer."""
        return self._take(row, BODY, start, stop)

    def _take(self, row: Row, acts: tuple[str, ...], start: int, stop: int) -> Fault | None:
        with self._lock:
            for counted in self._all:
                fault = counted.fault
                if fault.act not in acts or not fault.concerns(row):
                    continue
                if fault.act in BODY and not fault.reaches(start, stop):
                    continue
                if counted.take():
                    row.fault = fault.name
                    return fault
        return None
