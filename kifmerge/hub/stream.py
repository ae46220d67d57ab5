"""A file on the Hub read through: a few blocks ahead, each byte pulled once, nothing on the disk.

Readers say beforehand which ranges they want, in the order in which they will, so that no more is
pulled, and that in time. What is pulled whole is compared with the hash that the repository has.
"""

from __future__ import annotations

import bisect
import functools
import mmap
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from kifmerge.errors import DamagedTransferError
from kifmerge.hub.background import in_background, result_of
from kifmerge.hub.client import Say, silent
from kifmerge.hub.content import ContentCheck
from kifmerge.hub.ranges import HubFile, RangeReader

BLOCK_BYTES = 1 << 22
# Pulled before they are asked for.
NUM_AHEAD = 2
# Of the blocks of all streams that are read together, those on their way among them.
_BUDGET_BYTES = 3 * (1 + NUM_AHEAD) * BLOCK_BYTES
_LEAST_BLOCK_BYTES = 1 << 18
# The header of a safetensors file, mostly with room to spare.
HEAD_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class _Span:
    """A part of a file that is pulled at once; ``number`` counts them as they will be read."""

    number: int
    start: int
    stop: int
    was_pulled: bool = False
    is_read: bool = False


@dataclass(slots=True, eq=False)
class _Block:
    """The bytes of a span, which are there or on their way."""

    span: _Span
    content: Future[memoryview]
    num_unread: int


class Shelf:
    """Holds the blocks of the files of one folder that wait to be read, or hashed; not too many.

    Args:
        most_blocks: when there are more, the oldest go, and are pulled again if need be.

    Attributes:
        most_blocks: as given.
        block_bytes: of a block at most; what is expected already stays as it was cut.
    """

    def __init__(self, most_blocks: int = 12) -> None:
        self.most_blocks = most_blocks
        self.block_bytes = BLOCK_BYTES
        self.lock = threading.RLock()
        self.blocks: dict[tuple[FileStream, int], _Block] = {}


class FileStream:
    """Reads any bytes of a file, cheapest in the order that was told. Safe to read from in threads.

    Args:
        file: what to read.
        say: told of long waits.
        shelf: shared by the files that are read together.
    """

    def __init__(self, file: HubFile, say: Say = silent, shelf: Shelf | None = None) -> None:
        self.file = file
        self._reader = RangeReader(file, say)
        self._check = ContentCheck(str(file), file.size, file.sha256, file.git_oid)
        self._shelf = shelf or Shelf()
        self._lock = self._shelf.lock
        self._head_lock = threading.Lock()
        self._head = b""
        self._in_file: list[_Span] = []
        self._in_turn: list[_Span] = []

    @property
    def is_unchecked(self) -> bool:
        """Whether all of it came, but in an order in which it could not be hashed."""
        with self._lock:
            pulled = len(self._head) + sum(s.stop - s.start for s in self._in_file if s.was_pulled)
            return pulled >= self.file.size and not self._check.has_passed

    def head(self, num_bytes: int) -> bytes:
        """The first bytes of the file; kept, so that they are pulled once.

        Raises:
            CheckpointError: the file cannot be read this way.
            TryAgainError: network or server failed, or these are not the repository's bytes.
        """
        with self._head_lock:
            start = len(self._head)
            if start < min(num_bytes, self.file.size):
                stop = min(max(num_bytes, HEAD_BYTES), self.file.size)
                more = bytes(self._reader.read(start, stop))
                self._check.feed(start, more)
                self._head += more
        self._check.refuse_damage()
        return self._head[:num_bytes]

    def compare_head(self) -> None:
        """Pull what was pulled of the head once more: what makes no sense may have come damaged.

        Raises:
            DamagedTransferError: it came otherwise.
            TryAgainError: network or server failed.
        """
        with self._head_lock:
            if bytes(self._reader.read(0, len(self._head))) != self._head:
                raise DamagedTransferError(
                    f"{self.file}: its first {len(self._head)} bytes came twice, and not alike: a "
                    "proxy may damage them. Try again"
                )

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell which ranges will be read, after those told before, in about this order.

        They are cut into blocks; ranges that follow one another share them.
        """
        with self._lock:
            last: _Span | None = None
            for start, stop in ranges:
                for part in self._unknown(max(start, len(self._head)), stop):
                    last = self._append(*part, last)

    def _unknown(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that were not told of before."""
        parts = []
        number = max(_find(self._in_file, start), 0)
        for span in self._in_file[number:]:
            if start >= stop or span.start >= stop:
                break
            if start < span.start:
                parts.append((start, span.start))
            start = max(start, span.stop)
        return [*parts, (start, stop)] if start < stop else parts

    def _append(self, start: int, stop: int, last: _Span | None) -> _Span | None:
        """Cut a part into spans, the first of which may lengthen the last one."""
        if last is not None and last.stop == start and not last.was_pulled:
            last.stop = start = min(stop, last.start + self._shelf.block_bytes)
        while start < stop:
            last = _Span(len(self._in_turn), start, min(start + self._shelf.block_bytes, stop))
            self._in_turn.append(last)
            bisect.insort(self._in_file, last, key=lambda span: span.start)
            start = last.stop
        return last

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be read this way.
            TryAgainError: network or server failed, or these are not the repository's bytes.
        """
        if offset + len(view) > self.file.size:
            raise IndexError(f"{self.file}: bytes {offset} to {offset + len(view)}")
        self._check.refuse_damage()
        if offset < len(self._head):
            part = self._head[offset : offset + len(view)]
            view[: len(part)] = part
            offset, view = offset + len(part), view[len(part) :]
        while view:
            block = self._block_at(offset, len(view))
            start = offset - block.span.start
            found = result_of(block.content)[start : start + len(view)]
            view[: len(found)] = found
            offset, view = offset + len(found), view[len(found) :]
            self._note_read(block, len(found))

    def _block_at(self, offset: int, num_bytes: int) -> _Block:
        """The block that holds a byte, those after it being on their way."""
        with self._lock:
            number = _find(self._in_file, offset)
            if number < 0 or offset >= self._in_file[number].stop:
                self.expect([(offset, offset + num_bytes)])
                number = _find(self._in_file, offset)
            current = self._in_file[number]
            if current.is_read:  # another pass over the file
                for span in self._in_file:
                    span.is_read = False
            for span in self._in_turn[current.number : current.number + 1 + NUM_AHEAD]:
                if not span.is_read and (self, span.start) not in self._shelf.blocks:
                    self._order(span)
            block = self._shelf.blocks[self, current.start]
            self._make_room(block)
            return block

    def _order(self, span: _Span) -> None:
        content = in_background(functools.partial(self._pull, span.start, span.stop))
        self._shelf.blocks[self, span.start] = _Block(span, content, span.stop - span.start)
        span.was_pulled = True

    def _pull(self, start: int, stop: int) -> memoryview:
        # From the system and back to it at once: the allocator keeps what threads let go.
        content = memoryview(mmap.mmap(-1, stop - start))
        try:
            self._reader.read_into(start, content)
            self._check.feed(start, content)
        except Exception:
            with self._lock:  # whoever tries again pulls it again
                self._shelf.blocks.pop((self, start), None)
            raise
        return content

    def _note_read(self, block: _Block, num_bytes: int) -> None:
        with self._lock:
            block.num_unread -= num_bytes
            block.span.is_read = block.num_unread <= 0
        self._tidy()

    def _tidy(self) -> None:
        """Let go what has been read and hashed."""
        blocks = self._shelf.blocks
        with self._lock:
            for key, block in list(blocks.items()):
                if key[0] is self and block.span.is_read and not self._check.is_pending(key[1]):
                    del blocks[key]

    def _make_room(self, current: _Block) -> None:
        """Let go the oldest blocks where there are too many."""
        blocks = self._shelf.blocks
        while len(blocks) > self._shelf.most_blocks:
            # What has been read waits for its hash only.
            oldest = next((key for key, block in blocks.items() if block.span.is_read), None)
            oldest = oldest or next(key for key, block in blocks.items() if block is not current)
            del blocks[oldest]
            stream, start = oldest
            if stream._check.is_pending(start):
                stream._check.forget_pending()


def shared_block_bytes(num_streams: int) -> int:
    """Of a block, so that streams that are read together need no more memory the more they are.

    >>> shared_block_bytes(3), shared_block_bytes(12)
    (4194304, 1048576)
    """
    fair = _BUDGET_BYTES // (num_streams * (1 + NUM_AHEAD))
    return min(max(1 << (fair.bit_length() - 1), _LEAST_BLOCK_BYTES), BLOCK_BYTES)


def _find(spans: list[_Span], offset: int) -> int:
    """Number of the last span that begins at a byte or before it; -1 if there is none."""
    return bisect.bisect_right(spans, offset, key=lambda span: span.start) - 1
