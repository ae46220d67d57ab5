"""The server's life, and what a test may ask and tell it without HTTP."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from loopback.access import Access
from loopback.cdn import Cdn, Signer
from loopback.faults import Fault
from loopback.flow import Shared
from loopback.lfs import Lfs
from loopback.listener import Listener
from loopback.log import Row
from loopback.reads import Reads
from loopback.routes import Routes
from loopback.store import Commit, Entry, Repo, Store, is_lfs, sha256_of
from loopback.writes import Writes

WRITE_TOKEN = "loopback-token-that-may-write"
READ_TOKEN = "loopback-token-that-may-read"
OTHER_TOKEN = "loopback-token-of-someone-else"
_TOKENS: Mapping[str, str] = {WRITE_TOKEN: "write", READ_TOKEN: "read", OTHER_TOKEN: "other"}


class LoopbackHub:
    """A Hub on this machine: two listeners in threads, from construction until ``close``.

    ``store_dir`` keeps everything, also for the next server with the same folder; without it a
    temporary folder goes when the server does. ``tokens`` maps each token to its role: ``write``
    (the user tester, who may change everything), ``read`` (the same user, who may not) or
    ``other`` (somebody else, who sees no private repository). Signed addresses are good for
    ``url_seconds``. ``link_rate`` is in bytes per second, for all connections together.

    A crash of the server itself fails the test that leaves the ``with`` block.
    """

    def __init__(
        self,
        store_dir: Path | None = None,
        *,
        tokens: Mapping[str, str] = _TOKENS,
        url_seconds: float = 3600,
        link_rate: float | None = None,
        port: int = 0,
    ) -> None:
        self._is_temporary = store_dir is None
        self.store_dir = Path(store_dir or tempfile.mkdtemp(prefix="loopback-hub-"))
        self._store = Store(self.store_dir)
        self._shared = Shared(link_rate)
        self._signer = Signer(self._store, url_seconds)
        access = Access(self._store, tokens)
        self._reads = Reads(self._store, access, self._signer)
        self._lfs = Lfs(self._store, access, self._signer)
        writes = Writes(self._store, access)
        routes = Routes(self._shared, self._reads, writes, self._lfs)
        cdn = Cdn(self._store, self._signer, self._lfs.put)
        self._hub = Listener("hub", port, self._shared, routes.route)
        self._cdn = Listener("cdn", 0, self._shared, cdn.route)
        self.endpoint = f"http://127.0.0.1:{self._hub.port}"
        self._reads.endpoint = self._lfs.endpoint = writes.endpoint = self.endpoint
        self._reads.cdn_endpoint = self._lfs.cdn_endpoint = f"http://localhost:{self._cdn.port}"
        for listener in (self._hub, self._cdn):
            listener.start()

    def close(self) -> None:
        """End both listeners and every connection."""
        if self._shared.closing.is_set():
            return
        self._shared.closing.set()
        for listener in (self._hub, self._cdn):
            listener.stop()
        if self._is_temporary:
            shutil.rmtree(self.store_dir)

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if self._shared.crashes and error is None:
            raise RuntimeError("the loopback server failed:\n" + "\n".join(self._shared.crashes))

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to take this server for the Hub."""
        home = self.store_dir / "home"
        home.mkdir(exist_ok=True)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # Repositories

    def add_repo(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes | Path],
        *,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Commit exactly ``files``, a folder or contents by path, on a branch; return its id.

        The repository and the branch are made where they are missing. Big files are hard-linked
        into the store: replace them rather than change them in place.
        """
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        entries: dict[str, Entry] = {}
        for path, source in files.items():
            add = self._store.add_file if isinstance(source, Path) else self._store.add_bytes
            entries[path] = add(path, source)  # type: ignore[arg-type]
        return self._put(repo_id, entries, kind, branch, private=private, gated=gated)

    def add_holes(self, repo_id: str, folder: Path) -> str:
        """Commit a folder of files that are mostly a hole, too large to be hashed; return its id.

        Large files are moved to the store, under a hash that is none of theirs.
        """
        entries: dict[str, Entry] = {}
        for path in sorted(folder.iterdir()):
            if is_lfs(path.name, path.stat().st_size):
                named = hashlib.sha256(f"{repo_id}/{path.name}".encode()).hexdigest()
                self._store.keep_object(path, named)
                entries[path.name] = self._store.lfs_entry(named)
            else:
                entries[path.name] = self._store.add_file(path.name, path)
        return self._put(repo_id, entries, "model", "main")

    def _put(
        self,
        repo_id: str,
        entries: Mapping[str, Entry],
        kind: str,
        branch: str,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        with self._store.lock:
            repo = self._store.find(repo_id, kind)
            if repo is None:
                repo = self._store.create(Repo(kind=kind, id=repo_id))
            repo.private, repo.gated = repo.private or private, repo.gated or gated
            ref = f"refs/heads/{branch}"
            parent = repo.refs.get(ref) or repo.refs.get("refs/heads/main")
            title = "Add files" if parent is None else "Replace files"
            return self._store.commit(repo, ref, entries, title=title, parent=parent).id

    def has_repo(self, repo_id: str, kind: str = "model") -> bool:
        return self._store.find(repo_id, kind) is not None

    def is_private(self, repo_id: str, kind: str = "model") -> bool:
        return self._store.repo(repo_id, kind).private

    def branches(self, repo_id: str, kind: str = "model") -> list[str]:
        return self._store.repo(repo_id, kind).branches()

    def head(self, repo_id: str, revision: str = "main", kind: str = "model") -> str:
        return self._commit(repo_id, revision, kind).id

    def commits(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Return the history of a revision, newest first."""
        head = self._commit(repo_id, revision, kind).id
        return list(self._store.repo(repo_id, kind).history(head))

    def paths(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[str]:
        return sorted(self._commit(repo_id, revision, kind).files)

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        return self.file_path(repo_id, path, revision, kind).read_bytes()

    def file_path(
        self, repo_id: str, path: str, revision: str = "main", kind: str = "model"
    ) -> Path:
        """Return where the server keeps a file: to be read only."""
        return self._store.content_path(self._commit(repo_id, revision, kind).files[path])

    def sha256(self, repo_id: str, path: str, revision: str = "main", kind: str = "model") -> str:
        return sha256_of(self.file_path(repo_id, path, revision, kind))

    def _commit(self, repo_id: str, revision: str, kind: str) -> Commit:
        repo = self._store.repo(repo_id, kind)
        sha = repo.resolve(revision)
        if sha is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return repo.commits[sha]

    # The log and the faults

    @property
    def log(self) -> list[Row]:
        """Every request since the start or the last ``clear_log``, in order of arrival."""
        return self._shared.log.rows

    def clear_log(self) -> None:
        self._shared.log.clear()

    def pulled_bytes(self, file_pattern: str = "*") -> int:
        """Return how many bytes of file contents were sent, heads left out."""
        return self._shared.log.pulled_bytes(file_pattern)

    def pushed_bytes(self) -> int:
        """Return how many bytes of LFS objects were received."""
        return self._shared.log.pushed_bytes()

    def fail(self, fault: Fault) -> None:
        self._shared.faults.add(fault)

    def mend(self) -> None:
        """Remove every fault."""
        self._shared.faults.clear()

    # What a test may set

    @property
    def page_size(self) -> int | None:
        """Entries for each page of a tree; None: 1000 as the Hub."""
        return self._reads.page_size

    @page_size.setter
    def page_size(self, value: int | None) -> None:
        self._reads.page_size = value

    @property
    def part_bytes(self) -> int | None:
        """Larger uploads go in parts of this size; None: each in one PUT."""
        return self._lfs.part_bytes

    @part_bytes.setter
    def part_bytes(self, value: int | None) -> None:
        self._lfs.part_bytes = value
