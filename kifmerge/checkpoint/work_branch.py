"""Work branches of a repository on the Hub: files go there one by one until all are whole.

A work branch begins as the main one and holds, beside what it began with,

    finished files
    .kifmerge/BRANCH.jsonl   one line for each of them, as in the journal of a folder

What it is called follows from what is being made, so that the same work finds it on any machine.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from huggingface_hub.errors import RevisionNotFoundError

from kifmerge.checkpoint.journal import refuse_full_disk, spoils_work
from kifmerge.checkpoint.records import parse_journal
from kifmerge.errors import KifmergeError
from kifmerge.hub.background import in_own_thread, result_of
from kifmerge.hub.client import Say, hub_api, patiently, silent
from kifmerge.hub.commit import Change, commit_change
from kifmerge.hub.listing import list_files
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.stream import FileStream
from kifmerge.hub.target import Target, find_head, open_target

BRANCH_PREFIX = "kifmerge-unfinished-"
_JOURNAL_FOLDER = ".kifmerge"
# Nobody should wait long for what only tidies up.
_TIDYING_SECONDS = 15.0
_TEMPORARY_PREFIX = "kifmerge-unfinished-"
# Younger folders may be about to be locked.
_LEAST_AGE_SECONDS = 60.0


class RepositoryWork:
    """A folder whose finished files go to a branch; at most one is on this disk.

    Args:
        branch: where they go.
        directory: on this disk, to be filled.
        say: told of long waits.

    Attributes:
        branch: where they go.
        directory: on this disk, to be filled.
        finished: file name -> what was noted when it was finished, verified against the branch.
        head: commit of the branch that holds them.
        holds_one: True.
    """

    holds_one = True

    def __init__(self, branch: Target, directory: Path, say: Say = silent) -> None:
        self.branch = branch
        self.directory = directory
        self._say = say
        self.head = open_target(branch)
        self._failure: KifmergeError | None = None
        self.finished = noted_at(branch, self.head, say)

    def note(self, record: Mapping[str, Any]) -> None:
        """Commit a finished file and its line in the journal; the file leaves this disk."""
        name = record["name"]
        finished = {**self.finished, name: dict(record)}
        journal = "".join(json.dumps(line) + "\n" for line in finished.values())
        change = Change(
            additions={
                name: self.directory / name,
                _journal_name(self.branch.revision): journal.encode(),
            },
            sha256={name: record["sha256"]},
        )
        commit = functools.partial(
            commit_change, self.branch, change, f"Add {name}", parent=self.head, say=self._say
        )
        try:
            # In another thread, so that Ctrl-C need not wait until a large file is sent.
            self.head = result_of(in_own_thread(commit)).commit
        except KifmergeError as error:
            self._failure = error
            raise
        self.finished = finished
        (self.directory / name).unlink()

    def refuse_full_disk(self, sizes: Iterable[int]) -> None:
        """There is one file at a time."""
        refuse_full_disk(self.directory, max(sizes, default=0), advice="set TMPDIR to another disk")

    def is_spoilt_by(self, error: BaseException) -> bool:
        """Whether what was finished before an error is worth nothing.

        That a file could not be sent says nothing against the others.
        """
        return error is not self._failure and spoils_work(error)

    @property
    def kept(self) -> str:
        """What an interrupted work can go on from, for messages."""
        return (
            f"{len(self.finished)} finished files are kept in {self.branch}: the same command goes "
            "on from them"
        )


def work_branch(target: Target, work: Mapping[str, Any]) -> Target:
    """Where the files of a work go until all are whole.

    Args:
        target: where they go then.
        work: plain JSON that says what is being made: all that the files depend on.
    """
    text = json.dumps([dict(work), target.revision], sort_keys=True)
    name = BRANCH_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:12]
    return Target(repo_id=target.repo_id, kind=target.kind, branch=name)


def work_branches(target: Target) -> list[Target]:
    """Branches of the repository that hold unfinished work; none where it is slow to tell."""

    def ask() -> list[str]:
        refs = hub_api().list_repo_refs(target.repo_id, repo_type=target.kind)
        return [ref.name for ref in refs.branches if ref.name.startswith(BRANCH_PREFIX)]

    asking = functools.partial(patiently, ask, f"listing the branches of {target.repo_id}")
    try:
        names = in_own_thread(asking).result(_TIDYING_SECONDS)
    except (KifmergeError, concurrent.futures.TimeoutError):
        return []
    return [Target(repo_id=target.repo_id, kind=target.kind, branch=name) for name in sorted(names)]


def try_to_delete(branch: Target, say: Say, *, expected: str | None = None) -> None:
    """Delete a work branch, or say that it has to be done by hand.

    Args:
        branch: that holds nothing of worth.
        say: told that it is left.
        expected: where it should be; elsewhere somebody else is at work.
    """

    def delete() -> None:
        if expected is not None and find_head(branch) != expected:
            return
        with contextlib.suppress(RevisionNotFoundError):
            hub_api().delete_branch(branch.repo_id, branch=branch.revision, repo_type=branch.kind)

    deleting = in_own_thread(functools.partial(patiently, delete, f"deleting {branch}"))
    try:
        deleting.result(_TIDYING_SECONDS)
    except (KifmergeError, concurrent.futures.TimeoutError):
        say(
            f"the branch {branch} is not needed any more, but could not be deleted: "
            f"`hf repos branch delete {branch.repo_id} {branch.revision}` does it"
        )


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder, which goes in the end."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX)))
        stack.enter_context(filelock.FileLock(directory / "lock", timeout=0))
        inner = directory / "new"
        inner.mkdir()
        yield inner


def remove_abandoned_folders() -> None:
    """Remove temporary folders of processes that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError, filelock.Timeout):
            status = left.lstat()
            is_old = time.time() - status.st_mtime > _LEAST_AGE_SECONDS
            if is_old and stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                with filelock.FileLock(left / "lock", timeout=0):
                    shutil.rmtree(left)


def noted_at(branch: Target, revision: str, say: Say) -> dict[str, dict[str, Any]]:
    """What the journal of a work branch says of those files that are there as it says."""
    _, files = list_files(branch.at(revision), say)
    journal = files.get(_journal_name(branch.revision))
    if journal is None:
        return {}
    text = read_small(journal, say).decode(errors="replace")
    return {record["name"]: record for record in parse_journal(text) if is_there(files, record)}


def is_there(files: Mapping[str, HubFile], record: Mapping[str, Any]) -> bool:
    """Whether a file is there as a journal's record says."""
    file = files.get(record["name"])
    return file is not None and (file.size, file.sha256) == (record["num_bytes"], record["sha256"])


def read_small(file: HubFile, say: Say) -> bytes:
    """Content of a small file that is not worth a place in the cache."""
    return FileStream(file, say).head(file.size)


def _journal_name(branch_name: str) -> str:
    """Of a work's own: where a work branch was merged into another, its journal says nothing."""
    return f"{_JOURNAL_FOLDER}/{branch_name}.jsonl"
