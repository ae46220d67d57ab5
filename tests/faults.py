"""Faults on purpose: processes that are killed, or fail, at a chosen change of the disk."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Told before each change of the disk what it is, with what it is done to; may raise, or never
# return.
OnChange = Callable[[str, tuple[Any, ...]], None]

_CHANGES = {
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "os.truncate": "truncate",
}
_WRITE = os.pwrite
_MAKES_A_FILE = os.O_CREAT | os.O_TRUNC
_PATIENCE_S = 60


def watch(on_change: OnChange) -> None:
    """Tell of each change of the disk that this process makes from now on, whatever its thread.

    It cannot be ended: only for processes of their own.
    """
    lock = threading.RLock()

    def tell(what: str, arguments: tuple[Any, ...]) -> None:
        with lock:
            on_change(what, arguments)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            tell(_CHANGES[event], arguments)
        elif event == "open" and arguments[2] & _MAKES_A_FILE:
            tell("open", arguments)

    def told(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tell(what, arguments)
            return function(*arguments)

        return call

    os.pwrite = told("write", os.pwrite)
    os.fsync = told("flush", os.fsync)
    sys.addaudithook(hook)


@dataclass
class Child:
    """A forked process, and what it had to say; as a context it does not outlive it."""

    pid: int
    pipe: int
    started: float = field(default_factory=time.monotonic)
    is_ended: bool = False

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_ended:
            self.kill()
            self.end()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; it may be over already."""
        os.kill(self.pid, number)

    def wait_for_stop(self) -> None:
        """Wait until it has stopped itself."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def end(self) -> Ended:
        """Wait for its end.

        Raises:
            TimeoutError: there is none.
        """
        said = b""
        with open(self.pipe, "rb", buffering=0) as stream:  # noqa: PTH123 (a descriptor)
            while select.select([stream], [], [], _PATIENCE_S)[0] and (
                part := stream.read(1 << 16)
            ):
                said += part
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        while not pid:
            if time.monotonic() - self.started > _PATIENCE_S:
                self.kill()
                raise TimeoutError("a forked process does not end")
            time.sleep(0.0005)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.is_ended = True
        seconds = time.monotonic() - self.started
        return Ended(os.waitstatus_to_exitcode(status), said.decode(), seconds)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal), what it said, after how long."""

    code: int
    text: str
    seconds: float

    def said(self) -> Any:
        """What it said last, from JSON."""
        return json.loads(self.text.splitlines()[-1])


def fork(work: Callable[[Callable[[Any], None]], None], on_change: OnChange | None = None) -> Child:
    """Run a function in a process of its own, which has all modules loaded already.

    Args:
        work: is given a function that sends anything to the parent, as a line of JSON.
        on_change: see :func:`watch`.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Threads of libraries: none of them is needed in the child, which only merges.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    code = 1
    try:
        os.close(reading)
        if on_change is not None:
            watch(on_change)
        work(lambda message: os.write(writing, (json.dumps(message) + "\n").encode()))
        code = 0
    except BaseException:  # noqa: BLE001 (it goes no further: this process ends)
        traceback.print_exc()
    finally:
        os._exit(code)


def dies_at(owner: Any, name: str, call: int, work: Callable[[], Any]) -> bool:
    """Run a function in a process that dies when ``owner.name`` is called for the given time.

    Returns:
        Whether it died; False if the function ended before.
    """
    method, calls = getattr(owner, name), 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            die()
        return method(*arguments, **options)

    def run(say: Callable[[Any], None]) -> None:
        setattr(owner, name, dying)
        work()

    ended = fork(run).end()
    assert ended.code in {0, -signal.SIGKILL}
    return ended.code != 0


def die() -> None:
    """End this process at once, with all its threads."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(descriptor: int, values: Any, offset: int) -> None:
    """As far as a write may have come when the process is killed."""
    _WRITE(descriptor, values[: len(values) // 2], offset)


class Unflushed:
    """What would be lost, were the power cut now.

    The content of files that were written since their last fsync, and the names that were made, or
    given by renaming, since the last fsync of their folder.
    """

    def __init__(self) -> None:
        self._opened: list[str] = []
        self._written: set[int] = set()
        # (name before, name now), the first empty where the file was made.
        self._named: list[tuple[str, str]] = []

    def see(self, what: str, arguments: tuple[Any, ...]) -> None:
        """Take note of a change that is about to happen."""
        self._look()
        if what == "open":
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (as it is named)
            self._opened.append(path)
            # Python tells of some files twice.
            if not os.path.lexists(path) and ("", path) not in self._named:
                self._named.append(("", path))
        elif what == "rename":
            before, now = (os.fsdecode(path) for path in arguments[:2])
            kept = [names for names in self._named if names[1] not in (before, now)]
            moved = [(made, _moved(name, before, now)) for made, name in kept]
            self._named = [*moved, (before, now)]
        elif what == "write":
            self._written.add(os.fstat(arguments[0]).st_ino)
        elif what == "flush":
            inode = os.fstat(arguments[0]).st_ino
            self._written.discard(inode)
            # A renaming is one change of both folders: it comes to the disk with either.
            self._named = [names for names in self._named if inode not in map(_folder_inode, names)]

    def left(self) -> dict[str, Any]:
        """All of it, for :func:`lose`."""
        self._look()
        named = [names for names in self._named if os.path.lexists(names[1])]
        return {"written": sorted(self._written), "named": named}

    def _look(self) -> None:
        # A file that was to be opened is there by the time of the next change.
        for path in self._opened:
            with contextlib.suppress(OSError):
                self._written.add(Path(path).stat().st_ino)
        self._opened.clear()


def _moved(path: str, before: str, now: str) -> str:
    return now + path.removeprefix(before) if path.startswith(before + os.sep) else path


def _folder_inode(path: str) -> int | None:
    folder = Path(path).parent
    return folder.stat().st_ino if path and folder.exists() else None


def lose(folder: Path, unflushed: Mapping[str, Any]) -> list[str]:
    """Do what a power failure may do: files are cut in half, names are gone, or as before.

    Returns:
        The names of all that it met.
    """
    met = []
    for path in _files(folder):
        if path.stat().st_ino in unflushed["written"]:
            os.truncate(path, path.stat().st_size // 2)
            met.append(path.name)
    made = [names for names in unflushed["named"] if not names[0]]
    renamed = [names for names in unflushed["named"] if names[0]]
    # What was made in a folder goes before the folder has its earlier name again.
    for before, now in [*made, *reversed(renamed)]:
        met.append(Path(now).name)
        if before and Path(before).parent.exists():
            Path(now).rename(before)
        elif Path(now).is_dir():
            shutil.rmtree(now)
        else:
            Path(now).unlink()
    return met


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: it does not come about.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.002)


def content(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of each file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
