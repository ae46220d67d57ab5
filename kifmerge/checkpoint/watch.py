"""The watch of a rank: it shows the others that this one lives, and sees whether they do.

Every rank beats once a second, in a thread of its own: rank 0 watches all, all watch rank 0. Who is
silent for a minute counts as dead. Who dies, or has an error, interrupts the work of all.
"""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Protocol

from kifmerge import errors
from kifmerge.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    KifmergeError,
    ToldElsewhereError,
    TryAgainError,
)

BEAT_SECONDS = 1.0
# Longer than a machine that swaps may stand still.
SILENCE_SECONDS = 60.0
_FAILURE = "failure"
_INTERRUPTED = "KeyboardInterrupt"
_FULL_DISK = "full disk"
# Those of torchrun, which ends all ranks when one has died, and of our own watch.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Store(Protocol):
    """What is used of torch.distributed's stores; none of it waits for what is not there yet."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def get(self, key: str) -> bytes: ...  # noqa: D102
    def check(self, keys: list[str]) -> bool: ...  # noqa: D102
    def add(self, key: str, amount: int) -> int: ...  # noqa: D102
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error of a rank, as the others hear of it.

    Attributes:
        rank: that has it.
        kind: name of its class, or one of the two that others cannot name.
        message: what it says.
        exit_code: of the processes.
        is_of_disk: whether a disk that failed has caused it.
    """

    rank: int
    kind: str
    message: str
    exit_code: int
    is_of_disk: bool = False

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What others need to know of an error."""
        kind, code = type(error).__name__, getattr(error, "exit_code", EXIT_BUG)
        if isinstance(error, KeyboardInterrupt):
            kind, code = _INTERRUPTED, EXIT_INTERRUPTED
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, code = _FULL_DISK, TryAgainError.exit_code
        is_of_disk = isinstance(error.__cause__, OSError)
        return cls(rank=rank, kind=kind, message=str(error), exit_code=code, is_of_disk=is_of_disk)

    def share(self, store: Store) -> Failure:
        """Tell all ranks, unless another has been first; returns what all of them know now."""
        known = store.compare_set(_FAILURE, "", json.dumps(asdict(self)))
        return Failure(**json.loads(known))

    def as_error(self) -> BaseException:
        """The same error on another rank; of a bug, whose traceback is told there, a silent one."""
        if self.kind == _INTERRUPTED:
            return KeyboardInterrupt()
        if self.kind == _FULL_DISK:
            return OSError(errno.ENOSPC, self.message)
        known = getattr(errors, self.kind, None)
        if not (isinstance(known, type) and issubclass(known, KifmergeError)):
            return ToldElsewhereError(self.exit_code)
        error = known(self.message)
        if self.is_of_disk:
            error.__cause__ = OSError(self.message)
        return error


class StoppedError(KeyboardInterrupt):
    """The work of this rank ends because of another, or because torchrun ends all."""


class Watch(threading.Thread):
    """Shows the others that this rank lives, sees whether they do, and interrupts the work.

    Attributes:
        failure: what has ended the work on another rank.
        num_done: progress of this rank, which its beats carry.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(name="kifmerge-watch", daemon=True)
        self.failure: Failure | None = None
        self.num_done = 0
        self._store = store
        self._rank = rank
        self._watched = range(1, size) if rank == 0 else range(1)
        self._num_beats = 0
        self._last_beats: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._interrupts = True
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts:
            self._interrupts = False
            raise StoppedError

    def no_longer_interrupt(self) -> None:
        """Leave the main thread alone: it is on its way out, beats are still to be seen."""
        self._interrupts = False

    def run(self) -> None:
        """What the thread does."""
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.beat()
                found = self._shared_failure() or self._silent_rank()
            except RuntimeError as error:
                found = _lost(self._rank, out_of_reach(error))
                self._ended.set()
            if found is not None and self.failure is None:
                self.failure = found
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def beat(self) -> None:
        """Show that this rank lives, and how far it has come."""
        self._num_beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._num_beats} {self.num_done}")

    def num_done_elsewhere(self) -> int:
        """Progress of the watched ranks."""
        for rank in self._watched:
            self.silence(rank)
        return sum(int(beat.split()[1]) for beat, _ in list(self._last_beats.values()) if beat)

    def _shared_failure(self) -> Failure | None:
        if not self._store.check([_FAILURE]):
            return None
        return Failure(**json.loads(self._store.get(_FAILURE)))

    def _silent_rank(self) -> Failure | None:
        for rank in self._watched:
            silence = self.silence(rank)
            if silence > SILENCE_SECONDS:
                host = self._store.get(f"host/{rank}").decode()
                return _lost(
                    self._rank,
                    f"rank {rank} on {host} has not been heard of for {silence:.0f} s: "
                    "it has died, or the network has failed",
                )
        return None

    def silence(self, rank: int) -> float:
        """For how long, in seconds, a rank has not been heard of."""
        key = f"beat/{rank}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        now = time.monotonic()
        before, since = self._last_beats.setdefault(rank, (beat, now))
        if beat != before:
            self._last_beats[rank], since = (beat, now), now
        return now - since

    def end(self, *, deaf: bool) -> None:
        """Stop; signals are handled as before, or no longer heard."""
        self._ended.set()
        self.join(timeout=2 * BEAT_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if deaf else handler)


def out_of_reach(error: Exception) -> str:
    """What is told when the store does not answer."""
    return (
        "the other processes are out of reach: one has died, or the network has failed "
        f"({in_short(error)})"
    )


def in_short(error: Exception) -> str:
    """What an error of torch says, without the frames of its stack."""
    return str(error).partition("\n")[0].strip()


def _lost(rank: int, message: str) -> Failure:
    return Failure.of(rank, TryAgainError(message))
