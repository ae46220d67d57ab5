"""Files on a loopback Hub, and what reading them costs."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from loopback import LoopbackHub

from kifmerge.hub import client
from kifmerge.hub.folder import HubFolder, open_hub_folder
from kifmerge.hub.ranges import HubFile
from kifmerge.hub.reference import parse_remote

MB = 1 << 20


def noise(seed: str, num_bytes: int) -> bytes:
    """Bytes that nothing compresses, always the same."""
    return hashlib.shake_256(seed.encode()).digest(num_bytes)


def be_quick(monkeypatch: pytest.MonkeyPatch, tries: int = 6) -> None:
    """Wait hardly at all between attempts."""
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(client, "MOST_TRIES", tries)


@contextlib.contextmanager
def closed(hub: LoopbackHub) -> Iterator[None]:
    """Close the Hub, and keep its port: the next free one may become another test's Hub."""
    hub.close()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind(("127.0.0.1", urlsplit(hub.endpoint).port))
        yield


def folder(
    hub: LoopbackHub,
    files: Path | Mapping[str, bytes | Path],
    repo_id: str = "org/a",
    fetch: str = "stream",
    **options: object,
) -> HubFolder:
    """Commit files and open them; nothing of that is in the log."""
    hub.add_repo(repo_id, files)
    opened = open_hub_folder(parse_remote(repo_id), fetch, **options)  # type: ignore[arg-type]
    hub.clear_log()
    return opened


def one_file(hub: LoopbackHub, content: bytes, name: str = "model.safetensors") -> HubFile:
    """Commit one file."""
    return folder(hub, {name: content}).files[name]


def pieces(start: int, stop: int, num_bytes: int = 512 << 10) -> list[tuple[int, int]]:
    """A range cut up."""
    return [(at, min(at + num_bytes, stop)) for at in range(start, stop, num_bytes)]


def read_by_threads(
    read_into: object, ranges: Iterable[tuple[int, int]], num_threads: int
) -> dict[int, bytes]:
    """Start -> bytes, read by threads that take the ranges in turn; the first error is raised."""
    found: dict[int, bytes] = {}
    errors: list[BaseException] = []
    left, lock = list(ranges), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                if not left:
                    return
                start, stop = left.pop(0)
            content = bytearray(stop - start)
            try:
                read_into(start, memoryview(content))  # type: ignore[operator]
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
            found[start] = bytes(content)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
