"""What is read: info, trees, commits, refs, and the files themselves."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from loopback.access import Access, commit_of, entry_of
from loopback.cdn import Signer
from loopback.store import Commit, Entry, Repo, Store
from loopback.wire import Answer, Refusal, Request


def iso(seconds: float) -> str:
    """Return a time as the Hub writes it."""
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Reads:
    """The routes that change nothing."""

    def __init__(self, store: Store, access: Access, signer: Signer) -> None:
        self.store, self.access, self._signer = store, access, signer
        self.endpoint = self.cdn_endpoint = ""
        self.page_size: int | None = None  # entries of a tree for each page; None: as the Hub

    def info(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self.access.repo(request, kind, repo_id)
        commit = commit_of(repo, revision)
        card = self._card(commit)
        value = {
            "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
            "id": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.id,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": iso(repo.date),
            "lastModified": iso(commit.date),
            "tags": [f"license:{card['license']}"] if "license" in card else [],
            "siblings": [
                _sibling(path, entry, request.flag("blobs"))
                for path, entry in sorted(commit.files.items())
            ],
        }
        if card:
            value["cardData"] = card
        if kind == "model":
            value["modelId"] = repo.id
            value["library_name"] = card.get("library_name")
        wanted = request.query.get("expand", []) + request.query.get("expand[]", [])
        if wanted:
            value = {name: value[name] for name in value if name in {"_id", "id", *wanted}}
        return Answer.of(value)

    def tree(self, request: Request, kind: str, repo_id: str, revision: str, folder: str) -> Answer:
        repo = self.access.repo(request, kind, repo_id)
        commit = commit_of(repo, revision)
        entries = _listing(commit.files)
        if folder and entries.get(folder, Entry(oid="", size=0)) is not None:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        inside = f"{folder}/" if folder else ""
        found = [
            path
            for path in sorted(entries)
            if path.startswith(inside)
            and (request.flag("recursive") or "/" not in path[len(inside) :])
        ]
        begin = int(base64.b64decode(request.first("cursor") or "") or b"0")
        expand = request.flag("expand")
        size = self.page_size or int(request.first("limit") or (50 if expand else 1000))
        page = [self._path(repo, commit, path, entries[path], expand) for path in found]
        answer = Answer.of(page[begin : begin + size])
        if begin + size < len(found):
            query = dict(request.query)
            query["cursor"] = [base64.b64encode(b"%d" % (begin + size)).decode()]
            url = f"{self.endpoint}{request.raw_path}?{urlencode(query, doseq=True)}"
            answer.headers["Link"] = f'<{url}>; rel="next"'
        return answer

    def paths_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self.access.repo(request, kind, repo_id)
        commit = commit_of(repo, revision)
        body = request.read()
        if "json" in request.headers.get("Content-Type", ""):
            raise Refusal(400, "paths are sent as a form")
        form = parse_qs(body.decode())
        expand = form.get("expand", ["false"])[0].lower() in ("1", "true")
        entries = _listing(commit.files)
        return Answer.of(
            [
                self._path(repo, commit, path, entries[path], expand)
                for path in dict.fromkeys(form.get("paths", []))
                if path in entries
            ]
        )

    def commits(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self.access.repo(request, kind, repo_id)
        return Answer.of(
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.message,
                    "authors": [{"user": "tester", "avatar": ""}],
                    "date": iso(commit.date),
                }
                for commit in repo.history(commit_of(repo, revision).id)
            ]
        )

    def refs(self, request: Request, kind: str, repo_id: str) -> Answer:
        repo = self.access.repo(request, kind, repo_id)
        value: dict[str, list[Any]] = {"branches": [], "tags": [], "converts": []}
        prefixes = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        if request.flag("include_prs"):
            value["pullRequests"] = []
            prefixes["pullRequests"] = "refs/pr/"
        for group, prefix in prefixes.items():
            for ref, sha in sorted(repo.refs.items()):
                if ref.startswith(prefix):
                    name = ref.removeprefix(prefix)
                    value[group].append({"name": name, "ref": ref, "targetCommit": sha})
        return Answer.of(value)

    def resolve(
        self, request: Request, kind: str, repo_id: str, revision: str, path: str
    ) -> Answer:
        repo = self.access.contents(request, kind, repo_id)
        commit = commit_of(repo, revision)
        try:
            entry = entry_of(commit, path)
        except Refusal as refusal:
            refusal.answer.headers["X-Repo-Commit"] = commit.id
            raise
        request.row.range = request.span(entry.size)
        name = path.rpartition("/")[2]
        headers = {
            "X-Repo-Commit": commit.id,
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}",
        }
        if entry.sha256 is None:
            headers["ETag"] = f'"{entry.oid}"'
            headers["Content-Type"] = "text/plain; charset=utf-8"
            return Answer(headers=headers, content=self.store.content_path(entry))
        headers["X-Linked-Size"] = str(entry.size)
        headers["X-Linked-Etag"] = f'"{entry.sha256}"'
        address = self._signer.sign(
            "GET", f"/{repo_id}/{path}", repo=repo_id, file=path, sha256=entry.sha256
        )
        headers["Location"] = f"{self.cdn_endpoint}{address}"
        return Answer(status=302, headers=headers)

    def _card(self, commit: Commit) -> dict[str, Any]:
        entry = commit.files.get("README.md")
        if entry is None or entry.sha256 is not None:
            return {}
        return front_matter(self.store.content_path(entry).read_text(errors="replace"))

    def _path(
        self, repo: Repo, commit: Commit, path: str, entry: Entry | None, expand: bool
    ) -> dict[str, Any]:
        value: dict[str, Any] = {"type": "file", "path": path}
        if entry is None:
            value |= {"type": "directory", "size": 0}
            value["oid"] = hashlib.sha1(f"{commit.id} {path}".encode()).hexdigest()
        else:
            value |= {"oid": entry.oid, "size": entry.size}
            if entry.sha256 is not None:
                value["lfs"] = _lfs(entry, "oid")
        if expand:
            last = _last_change(repo, commit, path)
            value["lastCommit"] = {"id": last.id, "title": last.title, "date": iso(last.date)}
        return value


def _lfs(entry: Entry, hash_name: str) -> dict[str, Any]:
    return {hash_name: entry.sha256, "size": entry.size, "pointerSize": entry.pointer_bytes}


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"rfilename": path}
    if blobs:
        value |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256 is not None:
            value["lfs"] = _lfs(entry, "sha256")
    return value


def _listing(files: Mapping[str, Entry]) -> dict[str, Entry | None]:
    """Return every file, and every folder as None."""
    entries: dict[str, Entry | None] = dict(files)
    for path in files:
        while path := path.rpartition("/")[0]:
            entries[path] = None
    return entries


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    """Return the commit that made ``path`` what it is in ``commit``."""

    def below(one: Commit) -> dict[str, Entry]:
        return {p: e for p, e in one.files.items() if p == path or p.startswith(f"{path}/")}

    last = commit
    for older in repo.history(commit.id):
        if below(older) != below(commit):
            break
        last = older
    return last


def front_matter(text: str) -> dict[str, Any]:
    """Return the flat part of a card's metadata: words, numbers as text, and lists of words."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    card: dict[str, Any] = {}
    name = None
    for line in found.group(1).splitlines() if found else ():
        if pair := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            name, value = pair.group(1), pair.group(2).strip()
            if value.startswith("["):
                card[name] = [_word(word) for word in value.strip("[]").split(",") if word.strip()]
            else:
                card[name] = _word(value) if value else []
        elif (item := re.fullmatch(r"\s*- (.*)", line)) and isinstance(card.get(name or ""), list):
            card[name or ""].append(_word(item.group(1)))
    return card


def _word(text: str) -> str:
    return text.strip().strip("'\"")
