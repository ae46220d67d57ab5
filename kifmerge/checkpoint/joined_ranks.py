"""Many ranks: what :mod:`kifmerge.checkpoint.ranks` promises, kept with torch.distributed.

Tensors are added up through a gloo process group, on CPUs; all else goes through the store that
torchrun's processes meet at. Meetings have no time limit, since the work between them may take
hours on one rank and minutes on another: :mod:`kifmerge.checkpoint.watch` sees to it that nobody
waits for the dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from kifmerge.checkpoint.ranks import OnProgress, Ranks
from kifmerge.checkpoint.watch import Failure, StoppedError, Store, Watch, in_short, out_of_reach
from kifmerge.errors import ToldElsewhereError, TryAgainError

_Value = TypeVar("_Value")

# Once the work has ended: of a rank that is still on its way out, and of one that has gone.
_MOST_ENDING_SECONDS = 30.0
GONE_SECONDS = 5.0
# Between two looks at how far the others have come.
_TELLING_SECONDS = 0.1
# Hosts may start some minutes apart. A sum itself is short: all ranks have met before it.
_JOIN_TIMEOUT = timedelta(minutes=5)


class JoinedRanks(Ranks):
    """This process as one of many.

    Args:
        store: where all of them meet.
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._store = store
        self._tell_progress: Callable[[], None] = lambda: None
        self._num_meetings = 0
        self._end: BaseException | None = None
        store.set(f"host/{rank}", platform.node())
        self._watch = Watch(store, rank, size)
        self._watch.start()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduced on the CPU; in place if it is there."""
        self.meet()
        total = values.cpu()
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise TryAgainError(
                f"a rank was lost while figures were added up ({in_short(error)})"
            ) from error
        return total.to(values.device)

    def gather(self, value: _Value) -> list[_Value]:
        """Through the store."""
        return self._said(value, is_heard=True)

    def to_first(self, value: _Value) -> list[_Value]:
        """Through the store."""
        return self._said(value, is_heard=self.is_first)

    def _said(self, value: _Value, *, is_heard: bool) -> list[_Value]:
        kind = f"said/{self._num_meetings}"
        with self._reaching():
            self._store.set(f"{kind}/{self.rank}", json.dumps(value))
            self.meet()
            ranks = range(self.size) if is_heard else ()
            return [json.loads(self._store.get(f"{kind}/{rank}")) for rank in ranks]

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Through the store."""
        key = f"first/{self._num_meetings}"
        with self._reaching():
            if self.is_first:
                self._store.set(key, json.dumps(make()))
            self.meet()
            value: _Value = json.loads(self._store.get(key))
        return value

    def meet(self) -> None:
        """Wait for as long as all live."""
        key = f"meeting/{self._num_meetings}"
        self._num_meetings += 1
        pause = 0.001
        with self._reaching():
            self._watch.beat()
            num_there = self._store.add(key, 1)
            while num_there < self.size:
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                self._tell_progress()
                num_there = self._store.add(key, 0)
            self._tell_progress()

    def adding_up(self, on_progress: OnProgress) -> OnProgress:
        """Those of the others come with their beats, while this rank works or waits."""
        num_told, asked = 0, time.monotonic()

        def tell() -> None:
            nonlocal num_told, asked
            asked = time.monotonic()
            total = self._watch.num_done + self._watch.num_done_elsewhere()
            if total > num_told:
                on_progress(total - num_told)
                num_told = total

        def add(number: int) -> None:
            self._watch.num_done += number
            if self.is_first and time.monotonic() - asked > _TELLING_SECONDS:
                tell()

        self._tell_progress = tell if self.is_first else lambda: None
        return add

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise TryAgainError(out_of_reach(error)) from error

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """On rank 0 an error leaves this when no other rank works any longer."""
        try:
            yield
        except BaseException as error:
            end = self._settled(error)
            if end is error:
                raise
            raise end from error

    def _settled(self, error: BaseException) -> BaseException:
        """What all ranks end with: the first error of any, told to all here."""
        self._watch.no_longer_interrupt()
        if self._end is not None:
            return self._end
        failure = self._watch.failure or Failure.of(self.rank, error)
        with contextlib.suppress(RuntimeError):  # whoever cannot be reached will find out
            failure = failure.share(self._store)
        self._watch.failure = failure
        told = failure.as_error()
        is_own = failure.rank == self.rank and not isinstance(error, StoppedError)
        is_worth_more = isinstance(told, ToldElsewhereError) and not isinstance(error, StoppedError)
        self._end = error if is_own or is_worth_more else told
        with contextlib.suppress(RuntimeError):
            self._store.set(f"stopped/{self.rank}", "")
            if self.is_first:
                self._wait_for_others("stopped")
        return self._end

    def _wait_for_others(self, what: str) -> None:
        """Wait until all others have said so, or are gone."""
        deadline = time.monotonic() + _MOST_ENDING_SECONDS
        others = [rank for rank in range(self.size) if rank != self.rank]
        while others and time.monotonic() < deadline:
            others = [rank for rank in others if not self._has_said(rank, what)]
            if others:
                time.sleep(0.02)

    def _has_said(self, rank: int, what: str) -> bool:
        return self._store.check([f"{what}/{rank}"]) or self._watch.silence(rank) > GONE_SECONDS

    def leave(self, error: BaseException | None) -> BaseException | None:
        """Part from the others; returns what this rank is to end with."""
        if error is None:
            try:
                self.meet()
            except BaseException as late:  # noqa: BLE001 (of another rank, or Ctrl-C)
                error = late
        end = None if error is None else self._ended_with(error)
        self._watch.no_longer_interrupt()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            if self.is_first:  # the store may end with this process
                self._wait_for_others("left")
        # torchrun ends all as soon as one has ended with an error: rank 0 is to tell it first.
        self._watch.end(deaf=self.is_first and end is not None)
        return end

    def _ended_with(self, error: BaseException) -> BaseException:
        end = self._settled(error)
        failure = self._watch.failure
        assert failure is not None
        if not isinstance(error, StoppedError):
            end = error  # on its way it was told what is kept
        if self.is_first:
            with contextlib.suppress(RuntimeError):
                self._store.set("told", "no" if isinstance(end, ToldElsewhereError) else "yes")
            return end
        return ToldElsewhereError(failure.exit_code) if self._is_told() else end

    def _is_told(self) -> bool:
        """Whether rank 0 tells the error."""
        deadline = time.monotonic() + 2 * _MOST_ENDING_SECONDS
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.check(["told"]):
                    return self._store.get("told") == b"yes"
                if self._watch.silence(0) > GONE_SECONDS:
                    return False
                time.sleep(0.02)
        return False


@contextlib.contextmanager
def joined() -> Iterator[JoinedRanks]:
    """See :func:`kifmerge.checkpoint.ranks.joined_ranks`.

    Raises:
        TryAgainError: the others cannot be reached.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=_JOIN_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise TryAgainError(
            f"cannot join the other processes at {where}: {in_short(error)}"
        ) from error
    own = dist.PrefixStore("kifmerge", store)  # type: ignore[attr-defined]
    ranks = JoinedRanks(own, rank, size)
    found: BaseException | None = None
    try:
        yield ranks
    except BaseException as raised:  # noqa: BLE001 (Ctrl-C is one of them)
        found = raised
    end = ranks.leave(found)
    dist.destroy_process_group()
    if end is not None:
        raise end
