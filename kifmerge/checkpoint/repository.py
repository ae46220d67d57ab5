"""A repository on the Hub that is filled file by file, and changes once, when all of it is there.

Finished files go to a work branch, each in a commit with a line in its journal, and leave this
disk. In the end one commit on the branch proper takes them over, with all the small files, and
removes what an earlier model has left; the work branch goes. Interrupted, the same work goes on
from its branch, on any machine.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kifmerge.checkpoint import mask, snapshot, units
from kifmerge.checkpoint.atomic import disk_errors
from kifmerge.checkpoint.digest import stem_of
from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.provenance import is_same
from kifmerge.checkpoint.source import ADAPTER_CONFIG
from kifmerge.checkpoint.work_branch import (
    RepositoryWork,
    is_there,
    noted_at,
    read_small,
    remove_abandoned_folders,
    temporary_folder,
    try_to_delete,
    work_branch,
    work_branches,
)
from kifmerge.errors import KifmergeError
from kifmerge.hub.background import in_own_thread, result_of
from kifmerge.hub.client import Say, silent
from kifmerge.hub.commit import Change, Committed, commit_change
from kifmerge.hub.listing import list_files
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.target import Target, find_head, look_up, open_target

_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")
# What is read beside or instead of the weights of a model, wherever it lies with them: of an
# earlier one it must not stay.
_READ_WITH_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*.bin",
    "*.bin.index.json", ADAPTER_CONFIG, snapshot.DETAIL_FILE, mask.DETAIL_FILE, units.DETAIL_FILE,
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_TEMPLATE_FOLDER = "additional_chat_templates/"


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

    @property
    def repository(self) -> str | None:
        """Its name, with the branch if it is not the main one."""
        return str(self.target)

    def refuse_inputs(self, parents: Iterable[Folder | None]) -> None:
        """Nothing: inputs are pinned to commits, which stay."""

    def find_made(
        self, detail_file: str, wanted: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Compare what the branch holds. Another model may be there: its commit stays."""
        remove_abandoned_folders()
        head = look_up(self.target, self.say).head
        if head is None:
            return None
        _, files = list_files(self.target.at(head), self.say)
        details = _read_json(files.get(detail_file), self.say)
        found = details.get("made_by")
        if not isinstance(found, dict) or not _are_there(files, details.get("files")):
            return None
        if not is_same(found, wanted()):
            return None
        with contextlib.suppress(KifmergeError):
            self._remove_finished(files)
        return details

    def _remove_finished(self, files: Mapping[str, HubFile]) -> None:
        """Remove the work branch of a process that was killed when all was done."""
        for branch in work_branches(self.target):
            noted = noted_at(branch, branch.revision, self.say)
            if noted and all(is_there(files, record) for record in noted.values()):
                try_to_delete(branch, self.say)

    @contextlib.contextmanager
    def begin(self, work: Mapping[str, Any]) -> Iterator[RepositoryWork]:
        """Give a folder to fill; on success the branch changes to it, in one commit.

        Interrupted, the finished files stay in the work branch; where the inputs were found wrong,
        or no file was finished, nothing stays. The error says which.

        Raises:
            CheckpointError: the token does not allow it, or somebody else has changed the branch
                in between.
            TryAgainError: network or server failed, or the disk is full.
        """
        main = Target(repo_id=self.target.repo_id, kind=self.target.kind)
        head: str | None = open_target(main, private=self.private, say=self.say)
        if self.target.branch is not None:
            # One that is not there comes into being when there is a model for it.
            head = find_head(self.target, self.say)
        branch = work_branch(self.target, work)
        self._tell_others(branch)
        with temporary_folder() as directory:
            making = RepositoryWork(branch, directory, self.say)
            self._tell_resumed(making)
            try:
                yield making
            except BaseException as error:
                self._end(making, error, is_spoilt=making.is_spoilt_by(error))
                raise
            try:
                committed = self._publish(making, head)
            except BaseException as error:
                self._end(making, error, is_spoilt=False)
                raise
        self.say(f"committed to {self.target}: {committed.url}")
        try_to_delete(branch, self.say)

    def _tell_others(self, own: Target) -> None:
        """Say which other works have been left unfinished."""
        others = [str(b) for b in work_branches(self.target) if b != own]
        if others:
            self.say(
                f"unfinished merges of other inputs or options are kept in {', '.join(others)}: "
                "each goes on when its own command is run again; where that is not wanted, `hf "
                "repos branch delete` removes it"
            )

    def _tell_resumed(self, making: RepositoryWork) -> None:
        if making.finished:
            self.say(
                f"going on from {making.branch}: {', '.join(making.finished)} are there already, "
                "and not made or sent again"
            )

    def _publish(self, making: RepositoryWork, head: str | None) -> Committed:
        parent = open_target(self.target, say=self.say) if head is None else head
        files = {
            path.relative_to(making.directory).as_posix(): path
            for path in sorted(making.directory.rglob("*"))
            if path.is_file()
        }
        _, there = list_files(self.target.at(parent), self.say)
        removals = stale_files(there, {*files, *making.finished})
        if removals:
            self.say(f"removing from {self.target}, with the same commit: {', '.join(removals)}")
        change = Change(
            additions=files,
            copies=dict.fromkeys(making.finished, making.head),
            removals=removals,
        )
        commit = functools.partial(
            commit_change, self.target, change, self.message, parent=parent, say=self.say
        )
        return result_of(in_own_thread(commit))

    def _end(self, making: RepositoryWork, error: BaseException, *, is_spoilt: bool) -> None:
        """Say what is kept, or delete what is worth nothing."""
        is_kept = bool(making.finished) and not is_spoilt
        if not is_kept:
            try_to_delete(making.branch, self.say, expected=making.head)
        kept = making.kept if is_kept else f"nothing is kept, {self.target} is as it was"
        with disk_errors(making.directory, kept):
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from error
            if isinstance(error, KifmergeError) and is_kept:
                raise type(error)(f"{error}; {kept}") from error
            if isinstance(error, OSError):
                raise error


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


def stale_files(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Files of an earlier model that would be read with a new one, or instead of it.

    >>> stale_files(["pytorch_model.bin", "vocab.txt", "a.png"], ["model.safetensors"])
    ['pytorch_model.bin', 'vocab.txt']
    """
    kept = frozenset(new)
    return sorted(
        name
        for name in there
        if name not in kept
        and (
            name.startswith(_TEMPLATE_FOLDER)
            or ("/" not in name and any(fnmatch.fnmatch(name, p) for p in _READ_WITH_WEIGHTS))
        )
    )


def _are_there(files: Mapping[str, HubFile], records: Any) -> bool:
    """Whether files are there as a ``kifmerge.json`` records them, if it does."""
    if not isinstance(records, dict):
        return True
    return all(
        name in files and isinstance(record, dict) and files[name].sha256 == record.get("sha256")
        for name, record in records.items()
    )


def _read_json(file: HubFile | None, say: Say) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no such file, or anything else in it."""
    if file is None:
        return {}
    try:
        content = json.loads(read_small(file, say))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
