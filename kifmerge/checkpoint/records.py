"""Records of finished files: what a journal holds, a line of JSON for each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.digest import file_sha256


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a journal, and bring it to the disk; its folder is left to the caller."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dict(record)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def parse_journal(text: str) -> list[dict[str, Any]]:
    """Its records, but for lines that a kill has left unfinished, or that are not ours."""
    return [record for line in text.splitlines() if (record := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the journal; None if it is not one of ours, whole."""
    try:
        record = json.loads(line)
        name, num_bytes, sha256 = record["name"], record["num_bytes"], record["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    types = (type(name), type(num_bytes), type(sha256))
    # A name with folders in it could lead out of the work.
    return record if types == (str, int, str) and Path(name).name == name else None


def is_whole(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is the one that was noted."""
    if not path.is_file() or path.stat().st_size != record["num_bytes"]:
        return False
    return bool(file_sha256(path) == record["sha256"])
