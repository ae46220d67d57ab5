"""A pool of threads that goes through a stream: each reads, computes and writes at the same time.

Reading, writing and torch's arithmetic let other threads run, so that workers overlap them. Torch's
own threads stay out of it: on pieces that fit a cache they cost more than they bring, and collapse
when the machine is busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from kifmerge.hub.background import abandoning

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Pieces handed out beyond those being worked on, so that no worker waits for the main thread.
_AHEAD = 2
# Names of glibc's options in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Workers:
    """Threads that apply a function to the items of a stream, results in the items' order.

    Without threads (0) everything happens in the caller's own thread, with its torch threads.

    Attributes:
        num: how many threads.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self._pool = ThreadPoolExecutor(num, "kifmerge") if num else None

    def map(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> Iterator[_Result]:
        """Yield the results in order; the first error ends the work and is raised."""
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[_Result]] = deque()
        stopped = threading.Event()

        def work(item: _Item) -> _Result:
            if stopped.is_set():
                raise InterruptedError("the work was ended")
            with abandoning(stopped):  # whoever waits for the network must not be waited for
                return function(item)

        try:
            for item in items:
                pending.append(self._pool.submit(work, item))
                if len(pending) > self.num + _AHEAD:
                    yield _first_result(pending)
            while pending:
                yield _first_result(pending)
        finally:
            stopped.set()
            for future in pending:
                if not future.cancel():
                    future.exception()  # waits: nothing may be written after this

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _first_result(pending: deque[Future[_Result]]) -> _Result:
    """Take the first out once it is there: an interruption must find it among the pending."""
    result = pending[0].result()
    pending.popleft()
    return result


@contextlib.contextmanager
def worker_pool(num: int | None = None) -> Iterator[Workers]:
    """Workers of one torch thread each, as many as there are processors unless told otherwise."""
    _keep_freed_memory()
    before = torch.get_num_threads()
    workers = Workers(num_processors() if num is None else num)
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let the allocator keep the buffers of one piece for the next.

    glibc gives blocks of this size back to the system when they are freed, and the system clears
    them when they are asked for again. Measured: half of a merge's time in the kernel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 28)


def num_processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has held so far: Python, torch and what they have read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What getrusage tells on Linux counts the process that started this one too.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # not on every system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
