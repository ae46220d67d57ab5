"""The CDN: signed addresses under another host name, which no token may reach."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import quote, urlencode

from loopback.store import Store
from loopback.wire import Action, Answer, Refusal, Request, expired


class Signer:
    """Makes and checks addresses that are good for ``seconds``."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._secret = store.secret
        self.seconds = seconds

    def sign(self, method: str, path: str, **query: str) -> str:
        """Return ``path?query`` with an end and a signature."""
        query["expires"] = repr(time.time() + self.seconds)
        query["signature"] = self._signature(method, path, query)
        return f"{quote(path)}?{urlencode(query)}"

    def check(self, request: Request) -> dict[str, str]:
        """Return the signed query. Raises Refusal."""
        query = {name: values[0] for name, values in request.query.items()}
        given = query.pop("signature", "")
        method = "GET" if request.method == "HEAD" else request.method
        if not hmac.compare_digest(given, self._signature(method, request.row.path, query)):
            raise Refusal(403, "SignatureDoesNotMatch")
        if time.time() > float(query["expires"]):
            refusal = Refusal(403, "Request has expired")
            refusal.answer = expired()
            raise refusal
        return query

    def _signature(self, method: str, path: str, query: dict[str, str]) -> str:
        text = "\n".join([method, path, *(f"{name}={query[name]}" for name in sorted(query))])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


class Cdn:
    """The second listener: contents of LFS files out, and (see lfs.py) in."""

    def __init__(self, store: Store, signer: Signer, put: Action) -> None:
        self.store, self.signer, self._put = store, signer, put

    def route(self, request: Request) -> Action:
        row = request.row
        row.kind = {"GET": "cdn", "HEAD": "cdn", "PUT": "put"}.get(request.method, "other")
        query = {name: values[0] for name, values in request.query.items()}
        row.repo, row.file = query.get("repo"), query.get("file")
        return self._act

    def _act(self, request: Request) -> Answer:
        if request.row.has_token:
            raise Refusal(400, "Only one auth mechanism allowed: the request carries a token")
        query = self.signer.check(request)
        if request.method == "PUT":
            return self._put(request)
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "MethodNotAllowed")
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{query["sha256"]}"'}
        return Answer(headers=headers, content=self.store.object_path(query["sha256"]))
