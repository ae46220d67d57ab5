"""What changes repositories: create, delete, branches, pull requests, and commits."""

from __future__ import annotations

import base64
import binascii
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from loopback.access import USERS, Access, commit_of
from loopback.reads import iso
from loopback.store import Commit, Entry, Pull, Repo, Store, is_lfs
from loopback.wire import Answer, Refusal, Request

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_PAGE = 50  # discussions


@dataclass(slots=True)
class _Draft:
    """A commit being read."""

    repo: Repo
    files: dict[str, Entry]
    title: str = ""
    message: str = ""
    parent: str | None = None


class Writes:
    """The routes that change something. Each has the store's lock while it does."""

    def __init__(self, store: Store, access: Access) -> None:
        self._store, self._access = store, access
        self.endpoint = ""

    # Repositories

    def create(self, request: Request) -> Answer:
        """Make a repository with one commit: a .gitattributes, as on the Hub."""
        body = request.json()
        kind, repo_id = self._named(request, body)
        self._access.may_write(request, repo_id)
        url = f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        with self._store.lock:
            if self._store.find(repo_id, kind) is not None:
                text = f"You already created this {kind} repo"
                return Answer.of({"error": text, "url": url}, 409, X_Error_Message=text)
            private = body.get("visibility") == "private" or bool(body.get("private"))
            repo = self._store.create(Repo(kind=kind, id=repo_id, private=private))
            files = {".gitattributes": self._store.add_regular(GIT_ATTRIBUTES)}
            self._store.commit(repo, "refs/heads/main", files, title="initial commit", parent=None)
        return Answer.of({"url": url, "name": repo_id, "id": repo_id})

    def delete(self, request: Request) -> Answer:
        kind, repo_id = self._named(request, request.json())
        repo = self._access.writable(request, kind, repo_id)
        self._store.delete(repo)
        return Answer.of({})

    def settings(self, request: Request, kind: str, repo_id: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        body = request.json()
        with self._store.lock:
            if "visibility" in body or "private" in body:
                repo.private = body.get("visibility") == "private" or bool(body.get("private"))
            if "gated" in body:
                repo.gated = bool(body["gated"])
            self._store.save(repo)
        return Answer.of({})

    def _named(self, request: Request, body: dict[str, Any]) -> tuple[str, str]:
        role = self._access.role(request)
        owner = body.get("organization") or (USERS[role] if role else "nobody")
        return body.get("type") or "model", f"{owner}/{body['name']}"

    # Branches

    def create_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        start = (request.json() if request.num_bytes else {}).get("startingPoint") or "main"
        with self._store.lock:
            if f"refs/heads/{branch}" in repo.refs:
                raise Refusal(409, f"Reference already exists: {branch}")
            repo.refs[f"refs/heads/{branch}"] = commit_of(repo, start).id
            self._store.save(repo)
        return Answer.of({})

    def delete_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        with self._store.lock:
            if branch == "main":
                raise Refusal(403, "the branch main cannot be deleted")
            if repo.refs.pop(f"refs/heads/{branch}", None) is None:
                raise Refusal(404, f"Reference does not exist: {branch}", "RevisionNotFound")
            self._store.save(repo)
        return Answer.of({})

    # Commits

    def preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        files = commit_of(repo, revision).files
        value = []
        for one in request.json()["files"]:
            path, there = one["path"], files.get(one["path"])
            mode = "lfs" if is_lfs(path, one["size"]) else "regular"
            oid = None if there is None else there.sha256 or there.oid
            value.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.of({"files": value})

    def commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        lines = [line for line in request.read().split(b"\n") if line.strip()]
        with self._store.lock:
            base = commit_of(repo, revision)
            draft = _Draft(repo, dict(base.files))
            for line in lines:
                try:
                    self._apply(draft, json.loads(line))
                except (ValueError, KeyError) as error:
                    raise Refusal(400, f"bad line in the commit: {error!r}") from None
            if not draft.title:
                raise Refusal(400, "the commit has no summary")
            url = f"{self.endpoint}/{repo_id}"
            value: dict[str, Any] = {"success": True, "hookOutput": ""}
            if request.flag("create_pr"):
                if draft.parent is not None:
                    base = commit_of(repo, draft.parent)
                pull = self._open(repo, draft.title, revision)
                commit = self._put(draft, f"refs/pr/{pull.num}", base)
                value["pullRequestUrl"] = f"{url}/discussions/{pull.num}"
            else:
                ref = repo.branch_ref(revision)
                if ref is None:
                    raise Refusal(400, f"{revision} is no branch")
                if draft.parent is not None and not base.id.startswith(draft.parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                commit = self._put(draft, ref, base)
        value |= {"commitOid": commit.id, "commitUrl": f"{url}/commit/{commit.id}"}
        return Answer.of(value)

    def _put(self, draft: _Draft, ref: str, base: Commit) -> Commit:
        return self._store.commit(
            draft.repo,
            ref,
            draft.files,
            title=draft.title,
            message=draft.message,
            parent=base.id,
        )

    def _apply(self, draft: _Draft, line: dict[str, Any]) -> None:
        """Do what one line of a commit says. Raises Refusal, KeyError or ValueError."""
        value = line["value"]
        match line["key"]:
            case "header":
                draft.title, draft.message = value["summary"], value.get("description", "")
                draft.parent = value.get("parentCommit")
            case "file":
                draft.files[value["path"]] = self._regular(value)
            case "lfsFile":
                draft.files[value["path"]] = self._lfs(draft.repo, value)
            case "deletedFile":
                if draft.files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                inside = value["path"].rstrip("/") + "/"
                gone = [path for path in draft.files if path.startswith(inside)]
                if not gone:
                    raise Refusal(404, "A folder with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del draft.files[path]
            case key:
                raise ValueError(f"unknown key {key!r}")

    def _regular(self, value: dict[str, Any]) -> Entry:
        if value.get("encoding") != "base64":
            raise ValueError("the content is not base64")
        try:
            data = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
        if is_lfs(value["path"], len(data)):
            raise Refusal(400, f"{value['path']} must be uploaded as an LFS object")
        return self._store.add_regular(data)

    def _lfs(self, repo: Repo, value: dict[str, Any]) -> Entry:
        oid = value["oid"]
        if oid not in repo.objects:
            raise Refusal(400, f"LFS object {oid} of {value['path']} was never uploaded")
        entry = self._store.lfs_entry(oid)
        if value.get("size", entry.size) != entry.size:
            raise Refusal(400, f"{value['path']} has {entry.size} bytes, not {value['size']}")
        return entry

    # Pull requests and discussions

    def _open(self, repo: Repo, title: str, base: str) -> Pull:
        pull = Pull(num=len(repo.pulls) + 1, title=title, base=base, date=time.time())
        repo.pulls.append(pull)
        return pull

    def discussions(self, request: Request, kind: str, repo_id: str, rest: str) -> Answer:
        repo = self._access.repo(request, kind, repo_id)
        if rest:
            return Answer.of(self._details(repo, self._pull(repo, rest)))
        wanted = request.first("type", "all"), request.first("status", "all")
        found = [
            pull
            for pull in reversed(repo.pulls)
            if wanted[0] in ("all", "pull_request" if pull.is_pull_request else "discussion")
            and wanted[1] in ("all", None, "open" if pull.status in ("open", "draft") else "closed")
            and request.first("author", "tester") == "tester"
        ]
        begin = int(request.first("p") or 0) * _PAGE
        page = [self._brief(repo, pull) for pull in found[begin : begin + _PAGE]]
        return Answer.of({"count": len(found), "start": begin, "discussions": page})

    def change_discussions(self, request: Request, kind: str, repo_id: str, rest: str) -> Answer:
        """Open a discussion or pull request; set its status; merge it."""
        repo = self._access.writable(request, kind, repo_id)
        body = request.json() if request.num_bytes else {}
        number, _, what = rest.partition("/")
        with self._store.lock:
            if not number:
                pull = self._open(repo, body["title"], "main")
                pull.is_pull_request = bool(body.get("pullRequest"))
                if pull.is_pull_request:
                    pull.status = "draft"
                    repo.refs[f"refs/pr/{pull.num}"] = commit_of(repo, "main").id
            else:
                pull = self._pull(repo, number)
                self._change(repo, pull, what, body or {})
            self._store.save(repo)
        return Answer.of(self._details(repo, pull) | {"newStatus": self._event(pull)})

    def _change(self, repo: Repo, pull: Pull, what: str, body: dict[str, Any]) -> None:
        if what == "status":
            pull.status = body["status"]
        elif what == "merge" and pull.is_pull_request and pull.status in ("open", "draft"):
            theirs = commit_of(repo, f"refs/pr/{pull.num}")
            ours = commit_of(repo, pull.base)
            if all(commit.id != ours.id for commit in repo.history(theirs.id)):
                raise Refusal(409, "the pull request is not based on the head of its branch")
            title = f"{pull.title} (#{pull.num})"
            ref = repo.branch_ref(pull.base) or pull.base
            self._store.commit(repo, ref, theirs.files, title=title, parent=ours.id)
            pull.status = "merged"
        else:
            raise Refusal(400, f"cannot {what} number {pull.num}, which is {pull.status}")

    def _pull(self, repo: Repo, number: str) -> Pull:
        if not number.isdigit() or not 1 <= int(number) <= len(repo.pulls):
            raise Refusal(404, f"no discussion {number}")
        return repo.pulls[int(number) - 1]

    def _brief(self, repo: Repo, pull: Pull) -> dict[str, Any]:
        return {
            "num": pull.num,
            "title": pull.title,
            "author": {"name": "tester"},
            "createdAt": iso(pull.date),
            "status": pull.status,
            "repo": {"name": repo.id, "type": repo.kind},
            "isPullRequest": pull.is_pull_request,
        }

    def _details(self, repo: Repo, pull: Pull) -> dict[str, Any]:
        value = self._brief(repo, pull) | {"events": [], "filesWithConflicts": [], "diff": ""}
        if pull.is_pull_request:
            base = f"refs/heads/{quote(pull.base)}"
            value["changes"] = {"base": base, "mergeCommitId": None}
        return value

    def _event(self, pull: Pull) -> dict[str, Any]:
        return {
            "id": f"{pull.num:024}",
            "type": "status-change",
            "createdAt": iso(time.time()),
            "author": {"name": "tester"},
            "data": {"status": pull.status},
        }
