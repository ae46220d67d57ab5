"""References to folders: a path on this disk, or a repository on the Hub.

org/name                            a model's repository, as its main branch stands
org/name@revision                   at a branch, a tag or a commit
hf://org/name@revision/sub/folder   a folder in it
hf://datasets/org/name@revision     of another kind
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kifmerge.errors import CheckpointError

RepoKind = Literal["model", "dataset"]

SCHEME = "hf://"
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
_REPO_ID = rf"{_PART}/{_PART}"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.-]+(?:%2F[\w.-]+)*"
_SHORT = re.compile(rf"(?P<repo_id>{_REPO_ID})(?:@(?P<revision>[\w./-]+))?")
_LONG = re.compile(
    rf"{SCHEME}(?:(?P<kind>models|datasets)/)?(?P<repo_id>{_REPO_ID})"
    rf"(?:@(?P<revision>{_REVISION}))?(?:/(?P<folder>[^@]*))?"
)
_LONG_FORM = f"{SCHEME}[datasets/]ORG/NAME[@REVISION][/FOLDER]"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A folder in a repository.

    Attributes:
        repo_id: ``org/name``.
        kind: of the repository.
        revision: branch, tag or commit; None is the main branch.
        folder: in the repository, without slashes at its ends; empty is all of it.
    """

    repo_id: str
    kind: RepoKind = "model"
    revision: str | None = None
    folder: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def pinned(self, commit: str) -> Reference:
        """The same at a commit."""
        return replace(self, revision=commit)

    def path(self, name: str) -> str:
        """Of a file of the folder, in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        if self.kind == "model" and not self.folder:
            return f"{self.repo_id}{revision}"
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        folder = f"/{self.folder}" if self.folder else ""
        return f"{SCHEME}{kind}{self.repo_id}{revision.replace('/', '%2F')}{folder}"


def parse_reference(text: str | Path) -> Reference | Path:
    """What a reference names: what is on this disk comes first, as a path always can be meant.

    Raises:
        CheckpointError: it begins with ``hf://``, and is no reference.

    >>> print(parse_reference("org/name@v1"), parse_reference("hf://org/name/sub"))
    org/name@v1 hf://org/name/sub
    >>> parse_reference("runs/task-1/merged")
    PosixPath('runs/task-1/merged')
    """
    if isinstance(text, Path):
        return text
    if not text.startswith(SCHEME):
        found = _parse_short(text)
        return Path(text) if found is None or Path(text).exists() else found
    return _parse_long(text)


def parse_remote(text: str) -> Reference:
    """What a reference names on the Hub, whatever there is on this disk.

    Raises:
        CheckpointError: it is no reference.
    """
    found = None if text.startswith(SCHEME) else _parse_short(text)
    return _parse_long(text) if found is None else found


def _parse_short(text: str) -> Reference | None:
    match = _SHORT.fullmatch(text)
    if match is None or not _is_repository(match):
        return None
    return Reference(repo_id=match["repo_id"], revision=match["revision"])


def _parse_long(text: str) -> Reference:
    match = _LONG.fullmatch(text)
    folder = ((match and match["folder"]) or "").rstrip("/")
    parts = folder.split("/") if folder else []
    if (
        match is None
        or not _is_repository(match)
        or {"", ".", ".."}.intersection(parts)
        or "\\" in folder
    ):
        raise CheckpointError(f"{text}: expected ORG/NAME[@REVISION] or {_LONG_FORM}")
    revision = match["revision"]
    return Reference(
        repo_id=match["repo_id"],
        kind="dataset" if match["kind"] == "datasets" else "model",
        revision=None if revision is None else revision.replace("%2F", "/"),
        folder=folder,
    )


def _is_repository(match: re.Match[str]) -> bool:
    repo_id, revision = match["repo_id"], match["revision"] or ""
    is_strange = any(part in repo_id for part in ("--", "..")) or repo_id.endswith(".git")
    return not (is_strange or repo_id.startswith("spaces/") or ".." in revision)
