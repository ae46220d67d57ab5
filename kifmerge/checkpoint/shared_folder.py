"""Folders that several ranks fill together: the first makes and publishes, all of them write."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import disk_errors, flush, whole_folder
from kifmerge.checkpoint.journal import (
    JOURNAL,
    KEPT,
    NEW,
    Journal,
    differences,
    rank_folder,
    resumable_folder,
    unfinished_folder,
)
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.records import append_record
from kifmerge.errors import RunError, TryAgainError, problem_list

# A network's file system may show another machine's new files some time later.
MOST_LATE_SECONDS = 60.0


class RankFolder:
    """Where a rank fills its files that is not the first, which has the :class:`Journal`.

    It writes in a folder of its own: a rank that lives on, out of reach, when the work is begun
    anew, cannot spoil what it no longer has a part in. A finished file goes to the others.

    Args:
        path: the folder to be made.
        rank: of this process.
        session: of :meth:`Journal.make_rank_folders`.
        finished: file name -> record, of an earlier call.

    Attributes:
        directory: to be filled.
        finished: file name -> what was noted when it was finished, then or by this rank.
        holds_one: False: all of its files stay.
    """

    holds_one = False

    def __init__(
        self, path: Path, rank: int, session: str, finished: Mapping[str, Mapping[str, Any]]
    ) -> None:
        work_dir = unfinished_folder(path)
        self.directory = rank_folder(work_dir, rank, session)
        self.finished = {name: dict(record) for name, record in finished.items()}
        self._path = work_dir / JOURNAL.replace(".", f"-{rank:05d}.")
        self._new = work_dir / NEW

    def note(self, record: Mapping[str, Any]) -> None:
        """Note a finished file, see :meth:`Journal.note`."""
        (self.directory / record["name"]).rename(self._new / record["name"])
        flush(self._new)
        append_record(self._path, record)
        self.finished[record["name"]] = dict(record)
        flush(self._path.parent)

    def refuse_full_disk(self, sizes: Iterable[int]) -> None:
        """Nothing: the first rank looks for all."""


@contextlib.contextmanager
def shared_resumable_folder(
    path: Path,
    work: Mapping[str, Any],
    ranks: Ranks,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Journal | RankFolder]:
    """As :func:`kifmerge.checkpoint.journal.resumable_folder`, for all ranks together.

    Raises:
        RunError: besides, the ranks do not make the same, or do not share the file system.
    """
    refuse_other_work(work, ranks)
    if not ranks.is_first:
        begun: dict[str, Any] = ranks.from_first(dict)
        folder = RankFolder(path, ranks.rank, begun["session"], begun["finished"])
        _wait_to_see(folder.directory, folder.directory.is_dir, begun["host"], ranks)
        try:
            with disk_errors(path, KEPT), ranks.ending_together():
                yield folder
        except TryAgainError as error:
            raise type(error)(f"{error}; {KEPT}") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"{path}: {KEPT}") from error
        except FileNotFoundError as error:
            if folder.directory.is_dir():
                raise
            raise RunError(
                f"{path}: rank {ranks.rank} has no part in the work any more, which has ended, or "
                "begun anew, without it"
            ) from error
        return
    with (
        resumable_folder(path, work, resume=resume, overwrite=overwrite) as journal,
        ranks.ending_together(),
    ):
        begun = {
            "host": platform.node(),
            "session": journal.make_rank_folders(ranks.size),
            "finished": journal.finished,
        }
        ranks.from_first(lambda: begun)
        yield journal


@contextlib.contextmanager
def shared_whole_folder(
    path: Path, work: Mapping[str, Any], ranks: Ranks, *, overwrite: bool = False
) -> Iterator[Path]:
    """As :func:`kifmerge.checkpoint.atomic.whole_folder`, for all ranks together.

    Every rank gets the same folder, to put files of its own there.

    Raises:
        RunError: besides, the ranks do not make the same, or do not share the file system.
    """
    refuse_other_work(work, ranks)
    if not ranks.is_first:
        begun: dict[str, Any] = ranks.from_first(dict)
        directory = path.parent / begun["folder"]
        _wait_to_see(directory, directory.is_dir, begun["host"], ranks)
        with disk_errors(path, "nothing was kept of it"), ranks.ending_together():
            yield directory
        return
    with whole_folder(path, overwrite=overwrite) as temporary, ranks.ending_together():
        folder = str(temporary.relative_to(path.parent))
        begun = {"host": platform.node(), "folder": folder}
        ranks.from_first(lambda: begun)
        yield temporary


def wait_for_files(directory: Path, sizes: Mapping[str, int], ranks: Ranks) -> None:
    """Wait until files that other ranks have written can be seen, whole.

    Args:
        directory: of the files.
        sizes: file name -> bytes.
        ranks: the first of them, which waits.

    Raises:
        RunError: they do not come.
    """
    for name, num_bytes in sizes.items():
        path = directory / name

        def is_there(path: Path = path, num_bytes: int = num_bytes) -> bool:
            return path.is_file() and path.stat().st_size == num_bytes

        _wait_to_see(path, is_there, "another host", ranks)


def _wait_to_see(path: Path, is_there: Callable[[], bool], host: str, ranks: Ranks) -> None:
    deadline = time.monotonic() + MOST_LATE_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            raise RunError(
                f"rank {ranks.rank} on {platform.node()} does not see {path}, which was written on "
                f"{host}: --out must be the same folder for all ranks, on a file system that they "
                "share"
            )
        time.sleep(0.05)


def refuse_other_work(work: Mapping[str, Any], ranks: Ranks) -> None:
    """Make sure that all ranks are about to make the same.

    Args:
        work: plain JSON that says what this rank is about to make, from what.
        ranks: that share the work.

    Raises:
        RunError: naming the differences.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(work)))
    begun = ranks.from_first(lambda: plain)
    if begun != plain:
        heading = (
            f"rank {ranks.rank} on {platform.node()} would make something else than rank 0: the "
            "same command, in the same folder, with the same inputs is needed everywhere"
        )
        names = ("on rank 0", f"on rank {ranks.rank}")
        raise RunError(problem_list(heading, list(differences(begun, plain, names=names))))
    ranks.meet()  # nobody begins before all agree
