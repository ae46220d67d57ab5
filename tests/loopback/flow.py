"""How bytes flow: the speed of the link, and bodies that break on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from loopback.faults import Fault, Faults
from loopback.log import Log

BLOCK_BYTES = 1 << 18


class Rate:
    """Bytes per second, shared by all who ``take``. Closing wakes everyone."""

    def __init__(self, rate: float | None, closing: threading.Event) -> None:
        self.rate = rate
        self._closing = closing
        self._lock = threading.Lock()
        self._free = 0.0

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES if self.rate is None else max(1, min(BLOCK_BYTES, int(self.rate / 20)))

    def take(self, num_bytes: int) -> None:
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(now, self._free) + num_bytes / self.rate
            wait = self._free - now
        rest(wait, self._closing)


def rest(seconds: float, closing: threading.Event) -> None:
    if closing.wait(seconds):
        raise ConnectionAbortedError("the server closes")


class Reset(Exception):  # noqa: N818
    """The connection ends with a TCP reset."""


class Shared:
    """What both listeners share."""

    def __init__(self, link_rate: float | None) -> None:
        self.log = Log()
        self.faults = Faults()
        self.closing = threading.Event()
        self.link = Rate(link_rate, self.closing)
        self.crashes: list[str] = []
        # Addresses that have met the fault: they stay so.
        self.expired: set[str] = set()


class Shape:
    """What a fault, and the speed of the link, do to a body that begins at ``start`` of a file."""

    def __init__(self, fault: Fault | None, start: int, hub: Shared) -> None:
        self._hub = hub
        self._cut = self._flip = self._stall = None
        self._is_reset = False
        self._own = Rate(None if fault is None else fault.rate, hub.closing)
        self._stall_seconds = 0.0
        if fault is not None:
            self._is_reset = fault.reset_at is not None
            self._cut = fault.reset_at if self._is_reset else fault.truncate_at
            self._flip = fault.flipped(start)
            self._stall, self._stall_seconds = fault.stall_at, fault.stall_seconds

    @property
    def block_bytes(self) -> int:
        return min(self._own.block_bytes, self._hub.link.block_bytes)

    def pieces(self, block: bytes, offset: int) -> Iterator[bytes]:
        """Yield ``block``, which is at ``offset`` of the body, as it is to be passed on."""
        end = offset + len(block)
        if self._flip is not None and offset <= self._flip < end:
            changed = bytearray(block)
            changed[self._flip - offset] ^= 0xFF
            block = bytes(changed)
        if self._cut is not None:
            block = block[: max(0, self._cut - offset)]
        if self._stall is not None and offset <= self._stall < end:
            yield from self._paced(block[: self._stall - offset])
            rest(self._stall_seconds, self._hub.closing)
            block = block[self._stall - offset :]
        yield from self._paced(block)

    def _paced(self, block: bytes) -> Iterator[bytes]:
        if block:
            self._own.take(len(block))
            self._hub.link.take(len(block))
            yield block

    def is_cut(self, offset: int) -> bool:
        return self._cut is not None and offset >= self._cut

    def end(self) -> Exception:
        return Reset() if self._is_reset else ConnectionAbortedError("cut")
