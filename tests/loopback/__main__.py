"""The server in a process of its own: ``python -m loopback --store DIR``."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
from pathlib import Path

from loopback.hub import LoopbackHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="loopback", description=__doc__)
    parser.add_argument("--store", type=Path, help="folder that keeps everything")
    parser.add_argument("--port", type=int, default=0, help="of the hub; 0: any free one")
    parser.add_argument("--link-rate", type=float, help="bytes per second over all connections")
    parser.add_argument("--url-seconds", type=float, default=3600, help="life of signed addresses")
    parser.add_argument("--part-bytes", type=int, help="larger uploads go in parts of this size")
    parser.add_argument(
        "--repo", action="append", default=[], metavar="ORG/NAME=FOLDER", help="to serve"
    )
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    hub = LoopbackHub(
        arguments.store,
        url_seconds=arguments.url_seconds,
        link_rate=arguments.link_rate,
        port=arguments.port,
    )
    with hub:
        hub.part_bytes = arguments.part_bytes
        for one in arguments.repo:
            repo_id, _, folder = one.partition("=")
            hub.add_repo(repo_id, Path(folder))
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"endpoint": hub.endpoint, "env": hub.env}), flush=True)  # noqa: T201
        ended.wait()


if __name__ == "__main__":
    main()
