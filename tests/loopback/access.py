"""Who may do what: tokens, and the refusals that the Hub gives for want of one."""

from __future__ import annotations

from collections.abc import Mapping

from loopback.store import Commit, Entry, Repo, Store
from loopback.wire import Refusal, Request

USERS = {"write": "tester", "read": "tester", "other": "other"}  # role -> account


class Access:
    """Reads the tokens of requests, finds what they ask for, and refuses."""

    def __init__(self, store: Store, tokens: Mapping[str, str]) -> None:
        self._store = store
        self._tokens = dict(tokens)
        for role in self._tokens.values():
            if role not in USERS:
                raise ValueError(f"role {role!r} of a token is none of {', '.join(USERS)}")

    def role(self, request: Request) -> str | None:
        """Return write, read or other; None without a token. Raises Refusal for a wrong one."""
        given = request.headers.get("Authorization")
        if given is None:
            return None
        role = self._tokens.get(given.removeprefix("Bearer "))
        if role is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return role

    def repo(self, request: Request, kind: str, repo_id: str) -> Repo:
        """Return a repository that the request may see. Raises Refusal."""
        role = self.role(request)
        with self._store.lock:
            repo = self._store.find(repo_id, kind)
        if repo is None or (repo.private and role not in ("write", "read")):
            if role is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def contents(self, request: Request, kind: str, repo_id: str) -> Repo:
        """Return a repository whose files the request may read."""
        repo = self.repo(request, kind, repo_id)
        if repo.gated:
            status = 401 if self.role(request) is None else 403
            message = f"Access to model {repo_id} is restricted and you are not on the list"
            raise Refusal(status, message, "GatedRepo")
        return repo

    def writable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """Return a repository that the request may change."""
        repo = self.repo(request, kind, repo_id)
        self.may_write(request, repo_id)
        return repo

    def may_write(self, request: Request, repo_id: str) -> None:
        """Raise Refusal unless the request may change, or make, that repository."""
        role = self.role(request)
        if role is None:
            raise Refusal(401, "Invalid username or password.")
        if role == "write" or (role == "other" and repo_id.startswith("other/")):
            return
        raise Refusal(403, "You don't have the rights to do this with this token")


def commit_of(repo: Repo, revision: str) -> Commit:
    """Return a commit by branch, tag, ref or id. Raises Refusal."""
    sha = repo.resolve(revision)
    if sha is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[sha]


def entry_of(commit: Commit, path: str) -> Entry:
    """Return a file of a commit. Raises Refusal."""
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    return commit.files[path]
