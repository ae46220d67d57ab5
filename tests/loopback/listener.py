"""One port of the server: connections, and the answers sent down them in small blocks."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback.flow import Reset, Shape, Shared
from loopback.log import Row
from loopback.wire import Action, Answer, Refusal, Request, expired

_DRAIN_S = 5.0  # how long what was sent may take to arrive before a reset


class Listener(ThreadingHTTPServer):
    """One port. ``route`` fills in the row of a request and returns what to do."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, name: str, port: int, hub: Shared, route: Callable[[Request], Action]
    ) -> None:
        self.name, self.hub, self.route = name, hub, route
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.crashes.append(traceback.format_exc())

    def stop(self) -> None:
        """Close the port and every connection."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        deadline = time.monotonic() + _DRAIN_S
        while self._open and time.monotonic() < deadline:
            with self._lock:
                for connection in self._open:
                    try:
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue
            time.sleep(0.005)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "loopback"
    disable_nagle_algorithm = True
    server: Listener

    @property
    def hub(self) -> Shared:
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except Reset:
            self._reset()
        except ConnectionError:  # cut, or closed by the other side
            self.close_connection = True

    def do_GET(self) -> None:
        row = Row(
            listener=self.server.name,
            method=self.command,
            path=unquote(urlsplit(self.path).path),
            has_token="Authorization" in self.headers,
        )
        request = Request(row, self.path, self.headers, self.rfile, self.hub)  # type: ignore[arg-type]
        action = self.server.route(request)
        if row.kind == "control":
            answer = self._act(request, action)
        else:
            self.hub.log.add(row)
            answer = self._answer(request, action)
        request.drain()
        self.close_connection = self.close_connection or not request.is_drained
        self._send(request, answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self, request: Request, action: Action) -> Answer:
        if self.path in self.hub.expired:
            return expired()
        fault = self.hub.faults.before(request.row)
        if fault is None:
            return self._act(request, action)
        if fault.after_act:
            self._act(request, action)
        if fault.reset:
            request.drain()  # else the other side might fail in sending, and see no reset
            raise Reset
        if fault.expire:
            self.hub.expired.add(self.path)
            return expired()
        headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
        return Answer.of({"error": f"loopback fault: {fault.name}"}, fault.status or 500, **headers)

    def _act(self, request: Request, action: Action) -> Answer:
        try:
            return action(request)
        except Refusal as refusal:
            return refusal.answer
        except (ConnectionError, Reset):
            raise
        except Exception:  # noqa: BLE001
            self.hub.crashes.append(traceback.format_exc())
            return Answer.of({"error": traceback.format_exc()}, 500)

    def _send(self, request: Request, answer: Answer) -> None:
        row, source = request.row, answer.content
        start, stop = 0, len(answer.body)
        if source is not None:
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            row.range = request.span(size)
            start, stop = self._part(row, answer, size)
        row.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD" or start == stop:
            return
        if isinstance(source, Path):
            with source.open("rb") as file:
                self._send_body(row, lambda at, n: os.pread(file.fileno(), n, at), start, stop)
        else:
            data = answer.body if source is None else source
            self._send_body(row, lambda at, n: data[at : at + n], start, stop)

    def _part(self, row: Row, answer: Answer, size: int) -> tuple[int, int]:
        """Return which bytes of a file to send; say so in the answer's head."""
        answer.headers["Accept-Ranges"] = "bytes"
        if row.range is None:
            return 0, size
        start, stop = row.range
        if start == stop:
            answer.status, answer.content = 416, None
            answer.headers["Content-Range"] = f"bytes */{size}"
            return 0, 0
        fault = None if self.command == "HEAD" else self.hub.faults.of_range(row)
        if fault is not None and fault.ignore_range:
            return 0, size
        if fault is not None:  # one byte further, or nearer, or less
            if stop < size:
                start, stop = start + 1, stop + 1
            elif start > 0:
                start, stop = start - 1, stop - 1
            else:
                start = 1
        answer.status = 206
        answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return start, stop

    def _send_body(
        self, row: Row, read: Callable[[int, int], bytes], start: int, stop: int
    ) -> None:
        fault = self.hub.faults.of_body(row, start, stop)
        shape = Shape(fault, start, self.hub)
        offset = 0
        while offset < stop - start:
            block = read(start + offset, min(shape.block_bytes, stop - start - offset))
            for piece in shape.pieces(block, offset):
                row.sent_bytes += len(piece)
                self.wfile.write(piece)
            offset += len(block)
            if shape.is_cut(offset):
                self.close_connection = True
                raise shape.end()

    def _reset(self) -> None:
        """Let arrive what was sent, then end the connection with a TCP reset."""
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            waiting = fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
            if struct.unpack("i", waiting)[0] == 0:
                break
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
