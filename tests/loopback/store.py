"""Repositories on disk: objects by their hash, commits, branches. Survives a restart.

``objects/`` holds LFS contents by sha256, ``blobs/`` the others by git's sha1, ``repos/`` one
folder for each repository: a file for each commit, and ``state.json`` replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
REGULAR_LIMIT_BYTES = 10_000_000  # above it a file is LFS, whatever its name
LINK_BYTES = 1 << 20  # a file of at least this size is hard-linked into the store, not copied


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of that name and size as an LFS object."""
    return size > REGULAR_LIMIT_BYTES or (path.endswith(".safetensors") and size > 0)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    ).encode()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a commit. ``oid`` is git's: of the pointer where the file is LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def pointer_bytes(self) -> int:
        return len(pointer(self.sha256 or "", self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    id: str
    title: str
    message: str = ""
    parent: str | None
    date: float
    files: Mapping[str, Entry] = field(repr=False)


@dataclass(slots=True, kw_only=True)
class Pull:
    num: int
    title: str
    base: str
    status: str = "open"
    date: float
    is_pull_request: bool = True


@dataclass(slots=True, kw_only=True)
class Repo:
    """One repository. ``refs`` maps ``refs/heads/main`` and the like to commits."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    date: float = 0.0
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)  # sha256 of every LFS object uploaded here
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, tag, refs/... name or (short) commit id, else None."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        if len(revision) >= 7:
            found = [commit for commit in self.commits if commit.startswith(revision)]
            if len(found) == 1:
                return found[0]
        return None

    def branch_ref(self, revision: str) -> str | None:
        """Return the full name of the ref that a commit to ``revision`` moves, else None."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        return None

    def branches(self) -> list[str]:
        return sorted(
            r.removeprefix("refs/heads/") for r in self.refs if r.startswith("refs/heads")
        )

    def history(self, sha: str | None) -> Iterator[Commit]:
        """Yield the commit ``sha``, its parent, and so on."""
        while sha is not None:
            commit = self.commits[sha]
            yield commit
            sha = commit.parent


class Store:
    """All repositories. Hold ``lock`` to read or change more than one thing at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        shutil.rmtree(root / "incoming", ignore_errors=True)  # uploads that a stop cut short
        for name in ("objects", "blobs", "incoming", "repos"):
            (root / name).mkdir(parents=True, exist_ok=True)
        secret = root / "secret"
        if not secret.exists():
            secret.write_bytes(secrets.token_bytes(32))
        self.secret = secret.read_bytes()
        for state in sorted(root.glob("repos/*/*/*/state.json")):
            self._load(state)

    # Repositories and commits

    def find(self, repo_id: str, kind: str = "model") -> Repo | None:
        with self.lock:  # Nobody sees one between its creation and its first commit.
            return self.repos.get((kind, repo_id))

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        found = self.find(repo_id, kind)
        if found is None:
            raise KeyError(repo_id)
        return found

    def create(self, repo: Repo) -> Repo:
        with self.lock:
            repo.date = time.time()
            self.repos[repo.kind, repo.id] = repo
            self._folder(repo).mkdir(parents=True)
            return repo

    def delete(self, repo: Repo) -> None:
        with self.lock:
            del self.repos[repo.kind, repo.id]
            shutil.rmtree(self._folder(repo))

    def commit(
        self,
        repo: Repo,
        ref: str,
        files: Mapping[str, Entry],
        *,
        title: str,
        parent: str | None,
        message: str = "",
    ) -> Commit:
        """Put a commit with exactly ``files`` on top of ``parent`` and move ``ref`` to it."""
        with self.lock:
            when = time.time()
            named = sorted((path, entry.oid) for path, entry in files.items())
            text = json.dumps([parent, title, message, when, named, len(repo.commits)])
            sha = hashlib.sha1(text.encode()).hexdigest()
            commit = Commit(
                id=sha, title=title, message=message, parent=parent, date=when, files=dict(files)
            )
            self._write(self._folder(repo) / f"{sha}.json", asdict(commit))
            repo.commits[sha] = commit
            repo.objects.update(e.sha256 for e in files.values() if e.sha256 is not None)
            repo.refs[ref] = sha
            self.save(repo)
            return commit

    def save(self, repo: Repo) -> None:
        """Write everything but the commits, which never change."""
        state = {
            name: getattr(repo, name) for name in ("kind", "id", "private", "gated", "date", "refs")
        }
        state["pulls"] = [asdict(pull) for pull in repo.pulls]
        state["objects"] = sorted(repo.objects)
        self._write(self._folder(repo) / "state.json", state)

    def _folder(self, repo: Repo) -> Path:
        return self.root / "repos" / repo.kind / repo.id

    def _load(self, path: Path) -> None:
        state = json.loads(path.read_text())
        state["objects"] = set(state["objects"])
        state["pulls"] = [Pull(**pull) for pull in state["pulls"]]
        repo = Repo(**state)
        for file in path.parent.glob("*.json"):
            if file != path:
                commit = json.loads(file.read_text())
                commit["files"] = {name: Entry(**e) for name, e in commit["files"].items()}
                repo.commits[commit["id"]] = Commit(**commit)
        self.repos[repo.kind, repo.id] = repo

    @staticmethod
    def _write(path: Path, value: Any) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)

    # Contents

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def content_path(self, entry: Entry) -> Path:
        if entry.sha256 is not None:
            return self.object_path(entry.sha256)
        return self.root / "blobs" / entry.oid[:2] / entry.oid

    def incoming_path(self) -> Path:
        return self.root / "incoming" / secrets.token_hex(8)

    def lfs_entry(self, sha256: str) -> Entry:
        """Return the entry of an LFS object that is in the store."""
        size = self.object_path(sha256).stat().st_size
        return Entry(oid=git_sha1(pointer(sha256, size)), size=size, sha256=sha256)

    def keep_object(self, part: Path, sha256: str) -> None:
        """Move a file, whose hash was checked, to its place."""
        place = self.object_path(sha256)
        place.parent.mkdir(exist_ok=True)
        part.replace(place)

    def add_bytes(self, path: str, data: bytes) -> Entry:
        """Keep the contents of the file ``path`` of a repository."""
        if is_lfs(path, len(data)):
            part = self.incoming_path()
            part.write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            self.keep_object(part, sha256)
            return self.lfs_entry(sha256)
        return self.add_regular(data)

    def add_regular(self, data: bytes) -> Entry:
        entry = Entry(oid=git_sha1(data), size=len(data))
        place = self.content_path(entry)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            part = self.incoming_path()
            part.write_bytes(data)
            part.replace(place)
        return entry

    def add_file(self, path: str, source: Path) -> Entry:
        """Keep a file as ``add_bytes`` does; a big one is hard-linked where that is possible."""
        size = source.stat().st_size
        if size < LINK_BYTES or not is_lfs(path, size):
            return self.add_bytes(path, source.read_bytes())
        sha256 = sha256_of(source)
        if not self.object_path(sha256).exists():
            part = self.incoming_path()
            try:
                os.link(source.resolve(), part)
            except OSError:  # another disk, or no such thing there
                shutil.copyfile(source, part)
            self.keep_object(part, sha256)
        return self.lfs_entry(sha256)
