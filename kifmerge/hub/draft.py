"""A change of a repository before it is committed: what of it is there already, and what is not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    RepoFile,
)

from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.client import Say, hub_api, patiently, silent
from kifmerge.hub.target import Target
from kifmerge.hub.upload import one_line, reading_files, upload

# The Hub refuses requests about many more paths at once.
_PATHS_AT_ONCE = 500

Operation: TypeAlias = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a commit is to change.

    Attributes:
        additions: path in the repository -> file on this disk, or content.
        copies: path -> revision of the same repository that holds it; of LFS files alone.
        removals: paths that are to go; those that are not there do not matter.
        sha256: path -> SHA-256 that an addition must have, or nothing is sent.
    """

    additions: Mapping[str, Path | bytes] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    removals: Sequence[str] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


class Draft:
    """A change compared with what a commit holds; reads what must be hashed for that.

    Args:
        target: the repository.
        change: what is wanted.
        commit: that it is to follow; None where there is no repository yet.
        say: told of long waits.

    Attributes:
        target: the repository.
        changed: path -> bytes, of what is to be added or replaced.
        unchanged: paths that are there as wanted.
        removed: paths that are to go.

    Raises:
        CheckpointError: a file that cannot be read or is not the one expected, or nothing to copy.
        TryAgainError: network or server failed.
    """

    def __init__(
        self, target: Target, change: Change, commit: str | None, say: Say = silent
    ) -> None:
        self.target = target
        self._change = change
        self._say = say
        self._additions = {path: _addition(path, c) for path, c in change.additions.items()}
        self._copied_sha256: dict[str, str] = {}
        self._num_bytes = {path: op.upload_info.size for path, op in self._additions.items()}
        for path, revision in change.copies.items():
            self._find_copied(path, revision)
        with reading_files():
            _refuse_other(self._additions, change.sha256)
            there = {} if commit is None else self._files_at(commit)
            self.unchanged = [p for p in self._num_bytes if self._is_wanted(p, there.get(p))]
        self.changed = {p: n for p, n in self._num_bytes.items() if p not in self.unchanged}
        self.removed = [path for path in change.removals if path in there]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not self.changed and not self.removed

    def problems_at(self, revision: str) -> list[str]:
        """What a revision holds otherwise than wanted; nothing if the change is in it."""
        there = self._files_at(revision)
        with reading_files():
            other = [
                f"{path}: {'another content' if path in there else 'not there'}"
                for path in self._num_bytes
                if not self._is_wanted(path, there.get(path))
            ]
        return other + [f"{path}: still there" for path in self._change.removals if path in there]

    def upload(self, *, pull_request: bool = False) -> None:
        """Send the contents of what is changed, unless the Hub has them.

        Raises:
            CheckpointError: a file that cannot be read, or the token does not allow it.
            TryAgainError: network or server failed.
        """
        additions = [op for path, op in self._additions.items() if path in self.changed]
        num_bytes = sum(op.upload_info.size for op in additions)
        self._say(f"uploading {len(additions)} files, {num_bytes:,} bytes, to {self.target}")
        upload(self.target, additions, pull_request=pull_request, say=self._say)

    def operations(self) -> list[Operation]:
        """What the commit consists of."""
        return [
            *(op for path, op in self._additions.items() if path in self.changed),
            *(
                CommitOperationCopy(path, path, src_revision=revision)
                for path, revision in self._change.copies.items()
                if path in self.changed
            ),
            *(CommitOperationDelete(path, is_folder=False) for path in self.removed),
        ]

    def _find_copied(self, path: str, revision: str) -> None:
        found = _files(self.target, revision, [path], self._say).get(path)
        if found is None or found.lfs is None:
            problem = "there is none" if found is None else "it is kept in git itself"
            raise CheckpointError(
                f"copying {path} of {self.target.repo_id} from {revision}: {problem}"
            )
        self._num_bytes[path] = found.size
        self._copied_sha256[path] = found.lfs.sha256

    def _files_at(self, revision: str) -> dict[str, RepoFile]:
        paths = [*self._num_bytes, *self._change.removals]
        return _files(self.target, revision, paths, self._say)

    def _is_wanted(self, path: str, found: RepoFile | None) -> bool:
        if found is None or found.size != self._num_bytes[path]:
            return False
        if path in self._copied_sha256:
            return found.lfs is not None and found.lfs.sha256 == self._copied_sha256[path]
        addition = self._additions[path]
        if found.lfs is not None:
            return bool(found.lfs.sha256 == addition.upload_info.sha256.hex())
        return bool(found.blob_id == _git_oid(addition))


def _addition(path: str, content: Path | bytes) -> CommitOperationAdd:
    try:
        return CommitOperationAdd(path, content)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be sent ({one_line(error)})") from error


def _refuse_other(additions: Mapping[str, CommitOperationAdd], expected: Mapping[str, str]) -> None:
    """Refuse files that are not those expected, before any is sent."""
    problems = []
    for path, sha256 in expected.items():
        found = additions[path].upload_info.sha256.hex()
        if found != sha256:
            problems.append(f"{path}: SHA-256 {found}, expected {sha256}")
    if problems:
        raise CheckpointError(problem_list("files are not those that were recorded", problems))


def _files(target: Target, revision: str, paths: Sequence[str], say: Say) -> dict[str, RepoFile]:
    """Those of some paths that a revision holds."""
    found: dict[str, RepoFile] = {}
    for start in range(0, len(paths), _PATHS_AT_ONCE):
        part = list(paths[start : start + _PATHS_AT_ONCE])

        def ask(part: list[str] = part) -> list[Any]:
            return hub_api().get_paths_info(
                target.repo_id, part, revision=revision, repo_type=target.kind
            )

        for one in patiently(ask, f"listing {target}", say):
            if isinstance(one, RepoFile):
                found[one.path] = one
    return found


def _git_oid(addition: CommitOperationAdd) -> str:
    """Git's hash of a small file."""
    with addition.as_file() as stream:
        content = stream.read()
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()
