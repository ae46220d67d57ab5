"""A repository on the Hub that is filled file by file, and changes once, when all of it is there.

Finished files go to a work branch, each in a commit with a line in its journal, and leave this
disk. In the end one commit on the branch proper takes them over, with all the small files, and
removes what an earlier model has left; the work branch goes. Interrupted, the same work goes on
from its branch, on any machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import RevisionNotFoundError

from kifmerge.checkpoint.digest import stem_of
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.journal import parse_journal, refuse_full_disk, spoils_work
from kifmerge.checkpoint.provenance import is_same, read_details
from kifmerge.errors import KifmergeError
from kifmerge.hub.client import Say, hub_api, patiently, silent
from kifmerge.hub.commit import Change, Committed, commit_change
from kifmerge.hub.folder import HubFolder, open_hub_folder
from kifmerge.hub.target import Target, look_up, open_target

BRANCH_PREFIX = "kifmerge-unfinished-"
_JOURNAL = ".kifmerge/journal.jsonl"
_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")


class RepositoryWork:
    """A folder whose finished files go to a branch; at most one is on this disk.

    Args:
        branch: where they go.
        directory: on this disk, to be filled.
        say: told of long waits.

    Attributes:
        directory: on this disk, to be filled.
        finished: file name -> what was noted when it was finished, verified against the branch.
        head: commit of the branch that holds them.
        holds_one: True.
    """

    holds_one = True

    def __init__(self, branch: Target, directory: Path, say: Say = silent) -> None:
        self.directory = directory
        self._branch = branch
        self._say = say
        self.head = open_target(branch)
        self.finished: dict[str, dict[str, Any]] = {}
        there = open_hub_folder(branch.at(self.head))
        if _JOURNAL in there.files:
            text = (there / _JOURNAL).read_text(encoding="utf-8", errors="replace")
            self.finished = {
                record["name"]: record for record in parse_journal(text) if _is_there(there, record)
            }

    def note(self, record: Mapping[str, Any]) -> None:
        """Commit a finished file and its line in the journal; the file leaves this disk."""
        name = record["name"]
        finished = {**self.finished, name: dict(record)}
        journal = "".join(json.dumps(line) + "\n" for line in finished.values())
        change = Change(
            additions={name: self.directory / name, _JOURNAL: journal.encode()},
            sha256={name: record["sha256"]},
        )
        committed = commit_change(
            self._branch, change, f"Add {name}", parent=self.head, say=self._say
        )
        self.head = committed.commit
        self.finished = finished
        (self.directory / name).unlink()

    def refuse_full_disk(self, sizes: Iterable[int]) -> None:
        """There is one file at a time."""
        refuse_full_disk(self.directory, max(sizes, default=0), advice="set TMPDIR to another disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryDestination:
    """A branch of a repository on the Hub, which is created if need be.

    Attributes:
        target: the branch.
        private: whether others must not see a repository that is created.
        message: of the commit.
        say: told what is worth knowing.
    """

    target: Target
    private: bool | None = None
    message: str = "Merge with kifmerge"
    say: Say = silent

    def refuse_inputs(self, parents: Iterable[Folder | None]) -> None:
        """Nothing: inputs are pinned to commits, which stay."""

    def find_made(
        self, detail_file: str, wanted: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Compare what the branch holds. Another model may be there: its commit stays."""
        head = look_up(self.target, self.say).head
        if head is None:
            return None
        details = read_details(open_hub_folder(self.target.at(head)) / detail_file)
        found = details.get("made_by")
        return details if found is not None and is_same(found, wanted()) else None

    @contextlib.contextmanager
    def begin(self, work: Mapping[str, Any]) -> Iterator[RepositoryWork]:
        """Give a folder to fill; on success the branch changes to it, in one commit.

        Raises:
            CheckpointError: the token does not allow it.
            RunError: somebody else has changed the branch in between.
            TryAgainError: network or server failed.
        """
        head = open_target(self.target, private=self.private, say=self.say)
        branch = Target(
            repo_id=self.target.repo_id, kind=self.target.kind, branch=_branch_name(work)
        )
        with tempfile.TemporaryDirectory(prefix="kifmerge-") as directory:
            making = RepositoryWork(branch, Path(directory), self.say)
            self._tell_resumed(making, branch)
            try:
                yield making
            except BaseException as error:
                self._end(making, branch, error)
                raise
            try:
                committed = self._publish(making, head)
            except KifmergeError as error:
                raise type(error)(f"{error}; {_kept(making, branch)}") from error
        self._delete(branch)
        self.say(f"committed to {self.target}: {committed.url}")

    def _tell_resumed(self, making: RepositoryWork, branch: Target) -> None:
        if making.finished:
            self.say(f"going on from {branch}: {len(making.finished)} files are there already")

    def _publish(self, making: RepositoryWork, head: str) -> Committed:
        files = {
            path.relative_to(making.directory).as_posix(): path
            for path in sorted(making.directory.rglob("*"))
            if path.is_file()
        }
        new = {*files, *making.finished}
        there = open_hub_folder(self.target.at(head)).files
        change = Change(
            additions=files,
            copies=dict.fromkeys(making.finished, making.head),
            removals=stale_weights(there, new),
        )
        return commit_change(self.target, change, self.message, parent=head, say=self.say)

    def _end(self, making: RepositoryWork, branch: Target, error: BaseException) -> None:
        """Say what is kept, or delete what is worth nothing."""
        if not making.finished or spoils_work(error):
            with contextlib.suppress(KifmergeError):
                self._delete(branch)
            return
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_kept(making, branch)) from error
        if isinstance(error, KifmergeError):
            raise type(error)(f"{error}; {_kept(making, branch)}") from error

    def _delete(self, branch: Target) -> None:
        def delete() -> None:
            with contextlib.suppress(RevisionNotFoundError):
                hub_api().delete_branch(
                    branch.repo_id, branch=branch.revision, repo_type=branch.kind
                )

        patiently(delete, f"deleting {branch}", self.say)


def stale_weights(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Files of weights that an earlier version of the same artifact has left, and their index.

    >>> stale_weights(["model-00001-of-00002.safetensors", "a.txt"], ["model.safetensors"])
    ['model-00001-of-00002.safetensors']
    """
    kept = frozenset(new)
    stems = {_weights_stem(name) for name in kept if _WEIGHTS.fullmatch(name)}
    return sorted(
        name
        for name in there
        if _WEIGHTS.fullmatch(name) and _weights_stem(name) in stems and name not in kept
    )


def _weights_stem(name: str) -> str:
    return stem_of(name.removesuffix(".index.json"))


def _is_there(folder: HubFolder, record: Mapping[str, Any]) -> bool:
    file = folder.files.get(record["name"])
    return file is not None and (file.size, file.sha256) == (record["num_bytes"], record["sha256"])


def _branch_name(work: Mapping[str, Any]) -> str:
    text = json.dumps(dict(work), sort_keys=True)
    return BRANCH_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:12]


def _kept(making: RepositoryWork, branch: Target) -> str:
    return f"{len(making.finished)} finished files are kept in {branch}: the same command goes on"
