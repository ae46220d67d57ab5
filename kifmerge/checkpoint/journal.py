"""A folder that is made file by file: killed at any moment, the work goes on where it stood.

While OUT is being made, the hidden folder .OUT.unfinished beside it holds

    lock            held by the process that works there
    work.json       what is being made, from what: another work does not go on from here
    journal.jsonl   one line for each file that is whole on the disk, with its SHA-256
    journal-K.jsonl   the same of rank K, where several processes share the work
    new/            what becomes OUT, in one renaming, when all of it is there
    rank-K-*/       what rank K is writing
    replaced/       what OUT was, from just before that renaming to just after it
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from kifmerge.checkpoint.atomic import disk_errors, flush, write_json, write_text
from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.records import append_record, is_whole, parse_journal
from kifmerge.errors import (
    CheckpointError,
    DamagedTransferError,
    KifmergeError,
    RunError,
    TryAgainError,
    problem_list,
)

_LOCK = "lock"
_WORK = "work.json"
JOURNAL = "journal.jsonl"
_JOURNALS = "journal*.jsonl"
NEW = "new"
_RANK_FOLDERS = "rank-*"
_REPLACED = "replaced"
KEPT = "finished files are kept: --resume goes on from them"
_NOTHING_KEPT = "no file was finished, and nothing is kept"
# Configuration, card, index and journal, beside the files that a plan counts.
_SPARE_BYTES = 1 << 24


class Journal:
    """Where a resumable folder is filled, and which of its files are whole already.

    Attributes:
        directory: to be filled.
        finished: file name -> what was noted when it was finished, verified against the disk.
        holds_one: False: all of its files stay here.
    """

    holds_one = False

    def __init__(self, work_dir: Path) -> None:
        self.directory = work_dir / NEW
        self._path = work_dir / JOURNAL
        self.finished: dict[str, dict[str, Any]] = {}
        self.directory.mkdir(exist_ok=True)
        for name, record in self._make_one().items():
            if is_whole(self.directory / name, record):
                self.finished[name] = record
        self.remove_unfinished()

    def note(self, record: Mapping[str, Any]) -> None:
        """Note a finished file: its ``name``, ``num_bytes`` and ``sha256``, and whatever else.

        The file must have been flushed.
        """
        flush(self.directory)
        append_record(self._path, record)
        self.finished[record["name"]] = dict(record)
        flush(self._path.parent)

    def refuse_full_disk(self, sizes: Iterable[int]) -> None:
        """Refuse to begin what cannot end for lack of space."""
        refuse_full_disk(self.directory, sum(sizes))

    def remove_unfinished(self) -> None:
        """Remove what lies beside the finished files."""
        for path in (*self.directory.iterdir(), *self._path.parent.glob(_RANK_FOLDERS)):
            if path.name not in self.finished:
                _delete(path)

    def make_rank_folders(self, num_ranks: int) -> str:
        """A folder for each rank but the first; returns what :class:`RankFolder` finds it by."""
        session = secrets.token_hex(4)
        for rank in range(1, num_ranks):
            rank_folder(self._path.parent, rank, session).mkdir()
        flush(self._path.parent)
        return session

    def hear_ranks(self) -> None:
        """Take over what other ranks have noted."""
        for record in parse_journal("\n".join(map(_text, self._others()))):
            if (self.directory / record["name"]).is_file():
                self.finished.setdefault(record["name"], record)

    def _make_one(self) -> dict[str, dict[str, Any]]:
        """One journal of all ranks'; returns the last record of each file by its name."""
        others = self._others()
        # In about the order of time: the other ranks began when this journal held all.
        texts = [_text(path) for path in (self._path, *others)]
        records = parse_journal("\n".join(texts))
        # Later lines must not be glued to one that a kill has left unfinished.
        mended = "".join(json.dumps(record) + "\n" for record in records)
        if others or mended != texts[0]:
            write_text(self._path, mended)
        for path in others:
            path.unlink()
        return {record["name"]: record for record in records}

    def _others(self) -> list[Path]:
        return sorted({*self._path.parent.glob(_JOURNALS)} - {self._path})


def _text(journal: Path) -> str:
    """What a journal holds, which need not be there."""
    return journal.read_text(encoding="utf-8", errors="replace") if journal.exists() else ""


def rank_folder(work_dir: Path, rank: int, session: str) -> Path:
    """Where a rank that is not the first writes."""
    return work_dir / f"rank-{rank:05d}-{session}"


def unfinished_folder(path: Path) -> Path:
    """Where the work towards a folder is kept until it is whole."""
    target = path.resolve()
    return target.parent / f".{target.name}.unfinished"


@contextlib.contextmanager
def resumable_folder(
    path: Path, work: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Journal]:
    """Give a journal and a hidden folder to fill; on success rename it to ``path``.

    Interrupted, killed or out of space, the finished files stay for ``resume``; where the inputs
    were found wrong, or no file was finished, nothing stays. The error says which.

    Args:
        path: the folder to be made.
        work: plain JSON that says what is being made: all that the files depend on.
        resume: go on from the files that an earlier call has finished, once they are verified;
            otherwise what it left is removed.
        overwrite: what ``path`` holds goes at the end, when the new folder is whole.

    Raises:
        RunError: the folder is occupied, another process is making it, or the unfinished work is
            of another kind.
        TryAgainError: the disk is full.
    """
    work_dir = unfinished_folder(path)
    with disk_errors(path, _NOTHING_KEPT), _locked(work_dir, path):
        journal = None
        try:
            _put_back(work_dir, path)
            refuse_occupied(path, overwrite=overwrite)
            if not (resume and _has_leftovers(work_dir)):
                _empty(work_dir)
            _check_work(work_dir, path, work)
            journal = Journal(work_dir)
            yield journal
            _publish(journal, path, overwrite=overwrite)
            _remove(work_dir)
        except BaseException as error:
            _put_back(work_dir, path)
            kept = _tidied(work_dir, journal, error)
            with disk_errors(path, kept):
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"{path}: {kept}") from error
                if isinstance(error, KifmergeError) and journal and kept != _NOTHING_KEPT:
                    raise type(error)(f"{error}; {kept}") from error
                raise


def remove_finished(path: Path) -> None:
    """Remove what a process left that was killed when its folder already had its name."""
    work_dir = unfinished_folder(path)
    if not work_dir.is_dir() or _has_leftovers(work_dir):
        return
    with contextlib.suppress(RunError), _locked(work_dir, path):
        if not _has_leftovers(work_dir):
            _remove(work_dir)


def refuse_occupied(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, or a file in its place.

    Raises:
        RunError: naming it.
    """
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not overwrite:
        raise RunError(f"{path} exists already: it will not be overwritten")


def refuse_full_disk(
    path: Path, num_bytes: int, advice: str = "choose another disk for --out"
) -> None:
    """Refuse to begin what cannot end for lack of space.

    Args:
        path: of the folder to be made, which need not exist.
        num_bytes: that are still to be written.
        advice: what else than making room helps.

    Raises:
        TryAgainError: less is free.
    """
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes + _SPARE_BYTES:
        raise TryAgainError(
            f"{path}: {(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB are needed, "
            f"{free_bytes / 1e9:.2f} GB are free there: make room, or {advice}"
        )


@contextlib.contextmanager
def _locked(work_dir: Path, path: Path) -> Iterator[None]:
    """Hold the lock in the hidden folder, which is made if it is not there."""
    lock = filelock.FileLock(work_dir / _LOCK)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (filelock.Timeout, FileNotFoundError, FileExistsError):
        if work_dir.is_file():
            raise
        # Another process has the lock, or ends, and removes the folder with it.
        raise RunError(f"{path} is being made by another process at this moment") from None
    try:
        yield
    finally:
        lock.release()


def _has_leftovers(work_dir: Path) -> bool:
    """Whether there may be something to go on from: at the end ``new`` is renamed."""
    return (work_dir / NEW).is_dir()


def _check_work(work_dir: Path, path: Path, work: Mapping[str, Any]) -> None:
    """Write down what is being made, or compare it with what an earlier call wrote down."""
    plain = json.loads(json.dumps(dict(work)))
    anew = "or without --resume to begin anew"
    try:
        begun = read_details(work_dir / _WORK)
    except CheckpointError as error:
        raise RunError(f"{error}: call the command without --resume to begin anew") from error
    if not begun or not any(work_dir.glob(_JOURNALS)):
        _empty(work_dir)
        write_json(work_dir / _WORK, plain)
    elif begun != plain:
        heading = f"the unfinished work beside {path} was begun otherwise"
        raise RunError(
            problem_list(heading, list(differences(begun, plain)))
            + f"\nCall the command as it was called then, {anew}"
        )


def differences(
    begun: Any, now: Any, where: str = "", *, names: tuple[str, str] = ("then", "now")
) -> Iterator[str]:
    """Where two values of JSON differ, and how."""
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in sorted({*begun, *now}):
            if begun.get(key) != now.get(key):
                inner = f"{where}, {key}" if where else key
                yield from differences(begun.get(key), now.get(key), inner, names=names)
        return
    if isinstance(begun, list) and isinstance(now, list) and isinstance((begun + now)[0], list):
        # Long lists of files: those that have changed are of interest.
        begun, now = [i for i in begun if i not in now], [i for i in now if i not in begun]
    yield f"{where}: {json.dumps(begun)} {names[0]}, {json.dumps(now)} {names[1]}"


def _publish(journal: Journal, path: Path, *, overwrite: bool) -> None:
    """Rename the new folder, which is whole, once all of it is on the disk."""
    target = path.resolve()
    for inner in [*journal.directory.rglob("*"), journal.directory]:
        flush(inner)
    # The work may have taken hours: somebody may have put something there.
    refuse_occupied(path, overwrite=overwrite)
    replaced = journal.directory.with_name(_REPLACED)
    if replaced.exists():
        _delete(replaced)
    if target.exists():
        target.rename(replaced)
    journal.directory.rename(target)
    flush(target.parent)


def _put_back(work_dir: Path, path: Path) -> None:
    """Give a folder back its name that was lost between the two renamings of a replacement."""
    replaced, target = work_dir / _REPLACED, path.resolve()
    if _has_leftovers(work_dir) and replaced.exists() and not target.exists():
        replaced.rename(target)


def _tidied(work_dir: Path, journal: Journal | None, error: BaseException) -> str:
    """Remove what the work cannot go on from, after an error; returns what is kept."""
    if journal is None and any(work_dir.glob(_JOURNALS)):
        return KEPT
    if journal is not None:
        journal.hear_ranks()
    if journal is not None and not _has_leftovers(work_dir):
        _remove(work_dir)
        return "it is whole"
    if journal is None or spoils_work(error) or not journal.finished:
        _remove(work_dir)
        return _NOTHING_KEPT
    with contextlib.suppress(OSError):  # the error that led here is the one to be told
        journal.remove_unfinished()
    return f"{len(journal.finished)} {KEPT}"


def spoils_work(error: BaseException) -> bool:
    """Whether what was made before an error is worth nothing.

    Inputs that are wrong stay wrong, and what came damaged was used; a disk or a network that
    fails may recover.
    """
    if isinstance(error, DamagedTransferError):
        return True
    return isinstance(error, CheckpointError) and not isinstance(error.__cause__, OSError)


def _remove(work_dir: Path) -> None:
    """Remove the hidden folder; the lock in it is held, and no other's before it is gone."""
    with contextlib.suppress(OSError):
        _empty(work_dir)
        (work_dir / _LOCK).unlink()
        work_dir.rmdir()


def _empty(work_dir: Path) -> None:
    for inner in work_dir.iterdir():
        if inner.name != _LOCK:
            _delete(inner)


def _delete(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)
