"""A file on the Hub read through: a few blocks ahead, each byte pulled once, nothing on the disk.

Readers say beforehand which ranges they want, in the order in which they will, so that no more is
pulled, and that in time. What is pulled whole is compared with the hash that the repository has.
"""

from __future__ import annotations

import bisect
import functools
import mmap
import operator
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
# What is known of a block for good: that it was pulled and read, where it ends, and its digest.
_KNOWN_BYTES = 32
_start_of = operator.attrgetter("start")
_number_of = operator.attrgetter("number")


@dataclass(slots=True, eq=False)
class _Run:
    """Ranges that follow one another, to be pulled block by block.

    Thousands of gigabytes are told of before a byte is read: nothing is kept of each block before
    its turn.

    Attributes:
        number: of its first block; they are counted as they will be read.
        start: its first byte.
        stop: behind its last.
        block_bytes: of each block but the last.
    """

    number: int
    start: int
    stop: int
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return -(-(self.stop - self.start) // self.block_bytes)

    def number_at(self, offset: int) -> int:
        """Of the block that holds a byte."""
        return self.number + (offset - self.start) // self.block_bytes

    def range_of(self, number: int) -> tuple[int, int]:
        """The bytes of a block."""
        start = self.start + (number - self.number) * self.block_bytes
        return start, min(start + self.block_bytes, self.stop)


@dataclass(slots=True, eq=False)
class _Block:
    """Bytes that are pulled at once, and are there or on their way."""

    number: int
    start: int
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
        self._in_file: list[_Run] = []
        self._in_turn: list[_Run] = []
        # Of the blocks by number, those of the last runs may still be missing.
        self._was_pulled = bytearray()
        self._is_read = bytearray()
        self._pulled_bytes = 0

    @property
    def is_unchecked(self) -> bool:
        """Whether all of it came, but in an order in which it could not be hashed."""
        with self._lock:
            pulled_bytes = len(self._head) + self._pulled_bytes
            return pulled_bytes >= self.file.size and not self._check.has_passed

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
            last: _Run | None = None
            for start, stop in ranges:
                for part in self._unknown(max(start, len(self._head)), stop):
                    last = self._append(*part, last)

    def _unknown(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that were not told of before."""
        parts = []
        for number in range(max(self._find(start), 0), len(self._in_file)):
            run = self._in_file[number]
            if start >= stop or run.start >= stop:
                break
            if start < run.start:
                parts.append((start, run.start))
            start = max(start, run.stop)
        return [*parts, (start, stop)] if start < stop else parts

    def _append(self, start: int, stop: int, last: _Run | None) -> _Run:
        """Take in a part, which may lengthen the last run."""
        if last is not None and last.stop == start:
            last.stop = stop
            return last
        run = _Run(self._num_blocks, start, stop, self._shelf.block_bytes)
        self._in_turn.append(run)
        bisect.insort(self._in_file, run, key=_start_of)
        return run

    @property
    def _num_blocks(self) -> int:
        if not self._in_turn:
            return 0
        return self._in_turn[-1].number + self._in_turn[-1].num_blocks

    def _find(self, offset: int) -> int:
        """Place of the last run that begins at a byte or before it; -1 if there is none."""
        return bisect.bisect_right(self._in_file, offset, key=_start_of) - 1

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
            start = offset - block.start
            found = result_of(block.content)[start : start + len(view)]
            view[: len(found)] = found
            offset, view = offset + len(found), view[len(found) :]
            self._note_read(block, len(found))

    def _block_at(self, offset: int, num_bytes: int) -> _Block:
        """The block that holds a byte, those after it being on their way."""
        with self._lock:
            place = self._find(offset)
            if place < 0 or offset >= self._in_file[place].stop:
                self.expect([(offset, offset + num_bytes)])
                place = self._find(offset)
            run = self._in_file[place]
            current = run.number_at(offset)
            self._begin(current)
            for number in range(current, min(current + 1 + NUM_AHEAD, self._num_blocks)):
                if not self._is_read[number]:
                    self._order(number)
            block = self._shelf.blocks[self, run.range_of(current)[0]]
            self._make_room(block)
            return block

    def _begin(self, number: int) -> None:
        """See what is known of a block that is to be read."""
        num_new = self._num_blocks - len(self._is_read)
        self._is_read.extend(bytes(num_new))
        self._was_pulled.extend(bytes(num_new))
        if self._is_read[number]:  # another pass over the file
            self._is_read = bytearray(len(self._is_read))

    def _order(self, number: int) -> None:
        """Have a block pulled, unless it is there or on its way."""
        place = bisect.bisect_right(self._in_turn, number, key=_number_of) - 1
        start, stop = self._in_turn[place].range_of(number)
        if (self, start) in self._shelf.blocks:
            return
        content = in_background(functools.partial(self._pull, start, stop))
        self._shelf.blocks[self, start] = _Block(number, start, content, stop - start)
        if not self._was_pulled[number]:
            self._was_pulled[number] = True
            self._pulled_bytes += stop - start

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
            self._is_read[block.number] = block.num_unread <= 0
        self._tidy()

    def _tidy(self) -> None:
        """Let go what has been read and hashed."""
        blocks = self._shelf.blocks
        with self._lock:
            for key, block in list(blocks.items()):
                is_mine = key[0] is self and self._is_read[block.number]
                if is_mine and not self._check.is_pending(block.start):
                    del blocks[key]

    def _make_room(self, current: _Block) -> None:
        """Let go the oldest blocks where there are too many."""
        blocks = self._shelf.blocks
        while len(blocks) > self._shelf.most_blocks:
            # What has been read waits for its hash only.
            oldest = next((key for key, b in blocks.items() if key[0]._is_read[b.number]), None)
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


def stream_bytes(num_bytes: int, block_bytes: int) -> int:
    """Of memory that it takes to stream files, one after the other.

    Args:
        num_bytes: of all files together.
        block_bytes: of a block.

    >>> stream_bytes(10**9, 4_000_000), stream_bytes(10**12, 4_000_000)
    (16008000, 24000000)
    """
    blocks_bytes = (2 + NUM_AHEAD) * block_bytes
    return blocks_bytes + -(-num_bytes // block_bytes) * _KNOWN_BYTES
