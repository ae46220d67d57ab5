"""Threads that wait on the network, and on which nobody must wait: a process ends without them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

# As many files as the Hub's own client brings at once.
_NUM_THREADS = 8
_GLANCE_SECONDS = 0.05

Result = TypeVar("Result")

_tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_waiting = threading.local()


def in_background(call: Callable[[], Result]) -> Future[Result]:
    """Call in one of a few threads, in turn: for what takes seconds."""
    _start_threads()
    future: Future[Result] = Future()
    _tasks.put(functools.partial(_fulfil, future, call))
    return future


def in_order(calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results of calls in their order, of which a few are made at a time.

    The first of them that fails ends it; nobody waits for those that were begun before.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for call in calls:
            pending.append(in_background(call))
            if len(pending) == _NUM_THREADS:
                yield result_of(pending.popleft())
        while pending:
            yield result_of(pending.popleft())
    finally:
        for future in pending:
            future.cancel()


def in_own_thread(call: Callable[[], Result]) -> Future[Result]:
    """Call in a thread of its own: for what takes minutes."""
    future: Future[Result] = Future()
    _start_thread(functools.partial(_fulfil, future, call))
    return future


@contextlib.contextmanager
def abandoning(event: threading.Event) -> Iterator[None]:
    """Let this thread's waits end when an event is set: nobody wants their results any more."""
    before = getattr(_waiting, "event", None)
    _waiting.event = event
    try:
        yield
    finally:
        _waiting.event = before


def result_of(future: Future[Result]) -> Result:
    """Wait for the result of a call in the background; raises what it has raised.

    Raises:
        InterruptedError: the wait was abandoned.
    """
    event: threading.Event | None = getattr(_waiting, "event", None)
    while event is not None and not future.done():
        if event.is_set():
            raise InterruptedError("the work was ended")
        concurrent.futures.wait([future], _GLANCE_SECONDS)
    return future.result()


@functools.cache
def _start_threads() -> None:
    for _ in range(_NUM_THREADS):
        _start_thread(_work)


if hasattr(os, "register_at_fork"):  # not on every system
    # A forked process has none of them.
    os.register_at_fork(after_in_child=_start_threads.cache_clear)


def _start_thread(call: Callable[[], Any]) -> None:
    threading.Thread(target=call, name="kifmerge-hub", daemon=True).start()


def _work() -> None:
    while True:
        _tasks.get()()


def _fulfil(future: Future[Result], call: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)
