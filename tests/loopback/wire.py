"""Requests and answers, apart from the sockets that they come and go by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from loopback.flow import Shape, Shared
from loopback.log import Row


@dataclass(slots=True, kw_only=True)
class Answer:
    """What is sent back. With ``content``, a file or bytes, Range is honoured."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    content: Path | bytes | None = None

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        """Return ``value`` as JSON; ``header_name`` stands for ``header-name``."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        named["Content-Type"] = "application/json; charset=utf-8"
        return cls(status=status, headers=named, body=json.dumps(value).encode())


class Refusal(Exception):  # noqa: N818
    """An answer that says no, as the Hub says it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer = Answer.of({"error": message}, status)
        self.answer.headers.update(headers)


class Request:
    """One request: its head, and its body in blocks."""

    def __init__(
        self, row: Row, target: str, headers: Message, stream: BinaryIO, shared: Shared
    ) -> None:
        split = urlsplit(target)
        self.row = row
        self.method = row.method
        self.headers = headers
        self.query = parse_qs(split.query, keep_blank_values=True)
        self.raw_path = split.path
        self._stream, self._shared = stream, shared
        length = self.headers.get("Content-Length")
        self.num_bytes = None if length is None else int(length)
        self._is_chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        self._is_begun = self.is_drained = False

    def first(self, name: str, default: str | None = None) -> str | None:
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return (self.first(name) or "").lower() in ("1", "true")

    def span(self, size: int) -> tuple[int, int] | None:
        """Return the part asked for of a file of ``size`` bytes; (size, size) if it has none."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None or found.group(0) == "bytes=-":
            return None
        first, last = found.groups()
        if not first:
            return max(0, size - int(last)), size
        start, stop = int(first), min(size, int(last) + 1) if last else size
        return (start, stop) if start < stop else (size, size)

    def read(self) -> bytes:
        return b"".join(self.blocks())

    def drain(self) -> None:
        """Read what nobody has begun to read, and drop it."""
        for _ in self.blocks():
            pass

    def json(self) -> Any:
        try:
            return json.loads(self.read())
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None

    def blocks(self) -> Iterator[bytes]:
        """Yield the body; a fault of an upload's body happens here."""
        if self._is_begun:
            return
        self._is_begun = True
        fault, offset = None, 0
        if self.row.kind == "put":
            fault = self._shared.faults.of_body(self.row, 0, self.num_bytes or 0)
        shape = Shape(fault, 0, self._shared)
        for block in self._raw(shape.block_bytes):
            self.row.received_bytes += len(block)
            for piece in shape.pieces(block, offset):
                yield piece
                offset += len(piece)
            if shape.is_cut(offset):
                raise shape.end()
        self.is_drained = True

    def _raw(self, block_bytes: int) -> Iterator[bytes]:
        stream = self._stream
        if not self._is_chunked:
            yield from _take(stream, self.num_bytes or 0, block_bytes)
            return
        while num_bytes := int(stream.readline().split(b";")[0], 16):
            yield from _take(stream, num_bytes, block_bytes)
            stream.readline()
        while stream.readline().strip():
            pass


def _take(stream: BinaryIO, num_bytes: int, block_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0:
        block = stream.read(min(block_bytes, num_bytes))
        if not block:
            raise ConnectionResetError("the client went away")
        num_bytes -= len(block)
        yield block


Action = Callable[[Request], Answer]


def expired() -> Answer:
    """Return the CDN's answer to a signature that has expired."""
    body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    return Answer(status=403, headers={"Content-Type": "application/xml"}, body=body)
