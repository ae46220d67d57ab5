"""The hub's listener: which path means what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from loopback.access import USERS
from loopback.faults import Fault
from loopback.flow import Shared
from loopback.lfs import Lfs
from loopback.reads import Reads
from loopback.wire import Action, Answer, Refusal, Request
from loopback.writes import Writes

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_TYPES = "models|datasets|spaces"
_REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
_API = re.compile(rf"/api/(?P<type>{_TYPES})/(?P<repo>[^/]+/[^/]+?)(?:/(?P<rest>.*))?")
_RESOLVE = re.compile(
    rf"/(?:(?P<type>{_TYPES})/)?(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<file>.+)"
)
_GIT = re.compile(rf"/(?:(?P<type>{_TYPES})/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/(?P<what>[\w/]+)")

_Call = Callable[[Request, str, str], Answer]


class Routes:
    """Finds what a request to the hub is about, names it in its row, and returns what to do."""

    def __init__(self, shared: Shared, reads: Reads, writes: Writes, lfs: Lfs) -> None:
        self._shared, self._reads, self._writes, self._lfs = shared, reads, writes, lfs
        self._plain: dict[tuple[str, str], tuple[str, Action]] = {
            ("GET", "/api/whoami-v2"): ("whoami", self._whoami),
            ("POST", "/api/repos/create"): ("create", writes.create),
            ("DELETE", "/api/repos/delete"): ("delete", writes.delete),
            ("POST", "/api/validate-yaml"): ("yaml", lambda _: Answer.of({"warnings": []})),
            ("GET", "/api/agent-harnesses"): (
                "other",
                lambda _: Answer.of({"standardEnvVars": [], "harnesses": {}}),
            ),
            ("GET", "/_log"): ("control", lambda _: Answer.of(shared.log.as_json())),
            ("GET", "/_log/summary"): ("control", lambda _: Answer.of(shared.log.summary())),
            ("DELETE", "/_log"): ("control", self._clear_log),
            ("POST", "/_faults"): ("control", self._fail),
            ("DELETE", "/_faults"): ("control", self._mend),
        }

    def route(self, request: Request) -> Action:
        raw, row = request.raw_path, request.row
        if (request.method, raw) in self._plain:
            row.kind, action = self._plain[request.method, raw]
            return action
        if found := _RESOLVE.fullmatch(raw):
            if request.method in ("GET", "HEAD"):
                return self._resolve(request, found)
        elif found := _GIT.fullmatch(raw):
            return self._git(request, found)
        elif found := _API.fullmatch(raw):
            return self._api(request, found)
        return _nothing

    def _resolve(self, request: Request, found: re.Match[str]) -> Action:
        row = request.row
        row.kind, row.repo, row.file = "resolve", found["repo"], unquote(found["file"])
        kind, revision = _KINDS[found["type"] or "models"], unquote(found["revision"])
        return lambda r: self._reads.resolve(r, kind, found["repo"], revision, row.file or "")

    def _git(self, request: Request, found: re.Match[str]) -> Action:
        calls: dict[str, tuple[str, _Call]] = {
            "objects/batch": ("batch", self._lfs.batch),
            "verify": ("verify", self._lfs.verify),
            "complete": ("complete", self._lfs.complete),
        }
        request.row.repo = found["repo"]
        if request.method != "POST" or found["what"] not in calls:
            return _nothing
        request.row.kind, call = calls[found["what"]]
        return lambda r: call(r, _KINDS[found["type"] or "models"], found["repo"])

    def _api(self, request: Request, found: re.Match[str]) -> Action:
        kind, repo_id = _KINDS[found["type"]], found["repo"]
        request.row.repo = repo_id
        word, _, rest = (found["rest"] or "").partition("/")
        route = self._by_word(request.method, word, rest)
        if route is None:
            return _nothing
        request.row.kind, call, arguments = route
        return lambda r: call(r, kind, repo_id, *arguments)

    def _by_word(
        self, method: str, word: str, rest: str
    ) -> tuple[str, Callable[..., Answer], list[str]] | None:
        """Return the kind, the call and its arguments of /api/TYPE/REPO/WORD/REST."""
        reads, writes = self._reads, self._writes
        split = re.fullmatch(rf"{_REVISION}(?:/(?P<path>.*))?", rest)
        revision = unquote(split["revision"]) if split else ""
        path = unquote(split["path"] or "") if split else ""
        calls: dict[tuple[str, str], tuple[str, Callable[..., Answer], list[str]]] = {
            ("GET", ""): ("info", reads.info, ["main"]),
            ("GET", "revision"): ("info", reads.info, [revision]),
            ("GET", "tree"): ("tree", reads.tree, [revision, path]),
            ("POST", "paths-info"): ("paths-info", reads.paths_info, [revision]),
            ("GET", "commits"): ("commits", reads.commits, [revision]),
            ("GET", "refs"): ("refs", reads.refs, []),
            ("POST", "preupload"): ("preupload", writes.preupload, [revision]),
            ("POST", "commit"): ("commit", writes.commit, [revision]),
            ("POST", "branch"): ("branch", writes.create_branch, [revision]),
            ("DELETE", "branch"): ("branch", writes.delete_branch, [revision]),
            ("GET", "discussions"): ("discussions", writes.discussions, [rest]),
            ("POST", "discussions"): ("discussions", writes.change_discussions, [rest]),
            ("PUT", "settings"): ("settings", writes.settings, []),
        }
        return calls.get((method, word))

    def _whoami(self, request: Request) -> Answer:
        role = self._reads.access.role(request)
        if role is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": "read" if role == "read" else "write"}
        return Answer.of(
            {
                "type": "user",
                "id": USERS[role],
                "name": USERS[role],
                "fullname": USERS[role],
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def _clear_log(self, request: Request) -> Answer:
        self._shared.log.clear()
        return Answer.of({})

    def _fail(self, request: Request) -> Answer:
        try:
            fault: dict[str, Any] = json.loads(request.read())
            self._shared.faults.add(Fault(**fault))
        except (TypeError, ValueError) as error:
            return Answer.of({"error": str(error)}, 400)
        return Answer.of({})

    def _mend(self, request: Request) -> Answer:
        self._shared.faults.clear()
        return Answer.of({})


def _nothing(request: Request) -> Answer:
    raise Refusal(404, f"Sorry, we can't find {request.method} {request.row.path}")
