"""A file on the Hub read through: a few blocks ahead, each byte pulled once, nothing on the disk.

Readers say beforehand which ranges they want, so that no more is pulled. What is pulled whole is
compared with the hash that the repository has of it.
"""

from __future__ import annotations

import bisect
import functools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from kifmerge.hub.client import Say, silent
from kifmerge.hub.content import ContentCheck
from kifmerge.hub.ranges import HubFile, RangeReader

BLOCK_BYTES = 1 << 22
# Pulled before they are asked for, of each file.
NUM_AHEAD = 2
# Where readers jump about, blocks that are not used up must not gather.
_MOST_BLOCKS = 12
# The header of a safetensors file, mostly with room to spare.
_HEAD_BYTES = 1 << 16
_NUM_THREADS = 6


@dataclass(slots=True)
class _Block:
    """A part of the file that is being pulled, or was; dropped when all of it has been read."""

    start: int
    content: Future[bytearray]
    num_unread: int


class FileStream:
    """Reads any bytes of a file, cheapest in their order. Safe to read from in threads.

    Args:
        file: what to read.
        say: told of long waits.
    """

    def __init__(self, file: HubFile, say: Say = silent) -> None:
        self.file = file
        self._reader = RangeReader(file, say)
        self._check = ContentCheck(str(file), file.size, file.sha256, file.git_oid)
        self._lock = threading.Lock()
        self._head = b""
        # Of the blocks that are expected, in the order of the file.
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._is_read: set[int] = set()

    @property
    def is_unchecked(self) -> bool:
        """Whether blocks came in an order in which they could not be compared with the hash."""
        return self._check.has_given_up

    def head(self, num_bytes: int) -> bytes:
        """The first bytes of the file; kept, so that they are pulled once.

        Raises:
            CheckpointError: the file cannot be read this way.
            TryAgainError: network or server failed, or these are not the repository's bytes.
        """
        with self._lock:
            if len(self._head) < min(num_bytes, self.file.size):
                start = len(self._head)
                stop = min(max(num_bytes, _HEAD_BYTES), self.file.size)
                more = self._reader.read(start, stop)
                self._check.feed(start, more)
                self._head += bytes(more)
            return self._head[:num_bytes]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell which ranges will be read, beside those told before.

        They are cut into blocks; ranges that follow one another share them.
        """
        merged: list[tuple[int, int]] = []
        for start, stop in sorted((max(a, len(self._head)), b) for a, b in ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            elif start < stop:
                merged.append((start, stop))
        with self._lock:
            for start, stop in merged:
                self._expect_range(start, stop)

    def _expect_range(self, start: int, stop: int) -> None:
        """Fill what is not covered yet with blocks."""
        while start < stop:
            number = bisect.bisect_right(self._starts, start)
            if number and start < self._stops[number - 1]:
                start = self._stops[number - 1]
                continue
            end = self._starts[number] if number < len(self._starts) else stop
            block_stop = min(start + BLOCK_BYTES, stop, end)
            self._starts.insert(number, start)
            self._stops.insert(number, block_stop)
            start = block_stop

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on, which must be expected.

        Raises:
            CheckpointError: the file cannot be read this way.
            TryAgainError: network or server failed, or these are not the repository's bytes.
        """
        if offset < len(self._head):
            part = self._head[offset : offset + len(view)]
            view[: len(part)] = part
            offset, view = offset + len(part), view[len(part) :]
        while view:
            block = self._block_at(offset)
            start = offset - block.start
            found = memoryview(block.content.result())[start : start + len(view)]
            view[: len(found)] = found
            offset, view = offset + len(found), view[len(found) :]
            self._note_read(block, len(found))

    def _block_at(self, offset: int) -> _Block:
        with self._lock:
            number = bisect.bisect_right(self._starts, offset) - 1
            if number < 0 or offset >= self._stops[number]:
                raise IndexError(f"{self.file}: byte {offset} is not among those expected")
            current = self._starts[number]
            if current in self._is_read:  # another pass over the file
                self._is_read.clear()
            for ahead in range(number, min(number + 1 + NUM_AHEAD, len(self._starts))):
                start, stop = self._starts[ahead], self._stops[ahead]
                if start not in self._blocks and start not in self._is_read:
                    content = _in_background(functools.partial(self._pull, start, stop))
                    self._blocks[start] = _Block(start, content, stop - start)
            block = self._blocks[current]
            while len(self._blocks) > _MOST_BLOCKS:
                del self._blocks[next(other for other in self._blocks if other != current)]
            return block

    def _note_read(self, block: _Block, num_bytes: int) -> None:
        with self._lock:
            block.num_unread -= num_bytes
            if block.num_unread <= 0 and self._blocks.get(block.start) is block:
                del self._blocks[block.start]
                self._is_read.add(block.start)

    def _pull(self, start: int, stop: int) -> bytearray:
        content = self._reader.read(start, stop)
        self._check.feed(start, content)
        return content


_tasks: queue.SimpleQueue[tuple[Future[bytearray], Callable[[], bytearray]]] = queue.SimpleQueue()


@functools.cache
def _start_threads() -> None:
    # Daemons: a process that ends does not wait for what it has asked of the network.
    for number in range(_NUM_THREADS):
        threading.Thread(target=_work, name=f"kifmerge-hub-{number}", daemon=True).start()


def _work() -> None:
    while True:
        future, call = _tasks.get()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)
        del future, call


def _in_background(call: Callable[[], bytearray]) -> Future[bytearray]:
    _start_threads()
    future: Future[bytearray] = Future()
    _tasks.put((future, call))
    return future
