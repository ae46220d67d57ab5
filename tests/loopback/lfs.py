"""Uploads of LFS objects: batch, one PUT or several parts, completion, verification."""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loopback.access import Access
from loopback.cdn import Signer
from loopback.store import BLOCK_BYTES, Repo, Store
from loopback.wire import Answer, Refusal, Request

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Lfs:
    """An object belongs to the repository that it was uploaded to, as on the Hub."""

    def __init__(self, store: Store, access: Access, signer: Signer) -> None:
        self._store, self._access, self._signer = store, access, signer
        self.endpoint = self.cdn_endpoint = ""
        self.part_bytes: int | None = None
        self._lock = threading.Lock()
        self._parts: dict[str, dict[int, tuple[Path, str]]] = {}  # upload -> number -> file, etag

    def batch(self, request: Request, kind: str, repo_id: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        body = request.json()
        if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
            raise Refusal(422, "only uploads by sha256 are served")
        transfers = body.get("transfers", ["basic"])
        parts = self.part_bytes if "multipart" in transfers else None
        objects = [self._object(repo, one["oid"], one["size"], parts) for one in body["objects"]]
        is_multipart = any("chunk_size" in str(one) for one in objects)
        transfer = "multipart" if is_multipart else "basic"
        return Answer.of({"transfer": transfer, "objects": objects})

    def _object(self, repo: Repo, oid: str, size: int, part_bytes: int | None) -> dict[str, Any]:
        value: dict[str, Any] = {"oid": oid, "size": size}
        if not _SHA256.fullmatch(oid):
            return value | {"error": {"code": 422, "message": f"{oid} is no sha256"}}
        if oid in repo.objects:
            return value
        prefix = {"dataset": "datasets/", "space": "spaces/"}.get(repo.kind, "")
        git = f"{self.endpoint}/{prefix}{quote(repo.id)}.git/info/lfs"
        about = {"kind": repo.kind, "repo": repo.id, "oid": oid, "size": str(size)}
        verify = {"href": f"{git}/verify", "header": {}}
        if part_bytes is None or size <= part_bytes:
            href = self.cdn_endpoint + self._signer.sign("PUT", f"/{repo.id}/{oid}", **about)
            return value | {"actions": {"upload": {"href": href}, "verify": verify}}
        upload = self._store.incoming_path().name
        with self._lock:
            self._parts[upload] = {}
        header = {"chunk_size": str(part_bytes)}
        for number in range(1, -(-size // part_bytes) + 1):
            path = f"/{repo.id}/{oid}/{number}"
            length = str(min(part_bytes, size - (number - 1) * part_bytes))
            named = {**about, "size": length, "upload": upload, "part": str(number)}
            header[f"{number:05}"] = self.cdn_endpoint + self._signer.sign("PUT", path, **named)
        path = f"/{prefix}{repo.id}.git/info/lfs/complete"
        href = self.endpoint + self._signer.sign("POST", path, **about, upload=upload)
        return value | {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def put(self, request: Request) -> Answer:
        """Take an object, or one part of it; its signature was checked."""
        query = {name: values[0] for name, values in request.query.items()}
        place = self._store.incoming_path()
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        try:
            with place.open("wb") as file:
                for block in request.blocks():
                    sha256.update(block)
                    md5.update(block)
                    file.write(block)
                    size += len(block)
            if size != int(query["size"]):
                raise Refusal(400, f"{size} bytes arrived, {query['size']} were announced")
            etag = md5.hexdigest()
            if "upload" in query:
                self._keep_part(query, place, etag)
            elif sha256.hexdigest() != query["oid"]:
                raise Refusal(400, f"the content has sha256 {sha256.hexdigest()}")
            else:
                self._keep(query, place)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return Answer(headers={"ETag": f'"{etag}"'})

    def _keep_part(self, query: dict[str, str], place: Path, etag: str) -> None:
        with self._lock:
            parts = self._parts.get(query["upload"])
            if parts is None:
                raise Refusal(404, "NoSuchUpload")
            older = parts.pop(int(query["part"]), None)
            if older is not None:
                older[0].unlink()
            parts[int(query["part"])] = (place, etag)

    def _keep(self, query: dict[str, str], place: Path) -> None:
        """Make a checked file an object of its repository."""
        with self._store.lock:
            repo = self._store.find(query["repo"], query["kind"])
            if repo is None:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            self._store.keep_object(place, query["oid"])
            repo.objects.add(query["oid"])
            self._store.save(repo)

    def complete(self, request: Request, kind: str, repo_id: str) -> Answer:
        """Join the parts of an upload."""
        query = self._signer.check(request)
        body = request.json()
        with self._lock:
            parts = self._parts.get(query["upload"])
            if parts is None:
                raise Refusal(404, "NoSuchUpload")
            named = {one["partNumber"]: one["etag"].strip('"') for one in body["parts"]}
            if named != {number: etag for number, (_, etag) in parts.items()}:
                raise Refusal(400, "InvalidPart")
            del self._parts[query["upload"]]
        place = self._store.incoming_path()
        digest = hashlib.sha256()
        with place.open("wb") as whole:
            for _, (path, _) in sorted(parts.items()):
                with path.open("rb") as part:
                    while block := part.read(BLOCK_BYTES):
                        digest.update(block)
                        whole.write(block)
                path.unlink()
        if not digest.hexdigest() == query["oid"] == body["oid"]:
            place.unlink()
            raise Refusal(400, f"the content has sha256 {digest.hexdigest()}")
        self._keep(query, place)
        return Answer.of({"success": True})

    def verify(self, request: Request, kind: str, repo_id: str) -> Answer:
        repo = self._access.writable(request, kind, repo_id)
        body = request.json()
        oid = body["oid"]
        if oid not in repo.objects or self._store.lfs_entry(oid).size != body["size"]:
            raise Refusal(404, f"no such object: {oid}")
        return Answer.of({})
