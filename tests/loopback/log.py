"""What the server was asked and what it answered, one row for each request."""

from __future__ import annotations

import fnmatch
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

KINDS = (
    *("whoami", "create", "delete", "info", "tree", "paths-info", "commits", "refs", "branch"),
    *("discussions", "yaml", "settings", "preupload", "batch", "verify", "complete"),
    *("commit", "resolve", "cdn", "put", "other"),
)
CONTENT_KINDS = ("resolve", "cdn")  # the answers that carry file contents


@dataclass(slots=True, kw_only=True)
class Row:
    """One request. It is in the log from the moment its head was read, and fills up as it goes.

    ``sent_bytes`` and ``received_bytes`` count bodies only. A byte is counted before it is sent:
    whoever has received an answer finds it counted. ``range`` is (start, stop) as Python counts.
    """

    listener: str  # hub or cdn
    method: str
    path: str  # unquoted, without the query
    kind: str = "other"
    repo: str | None = None
    file: str | None = None  # its path in the repository
    range: tuple[int, int] | None = None
    status: int | None = None  # None: not answered, or not yet
    sent_bytes: int = 0
    received_bytes: int = 0
    has_token: bool = False
    fault: str | None = None

    @property
    def is_content(self) -> bool:
        """Whether the answer carried file contents, whole or in part."""
        return self.kind in CONTENT_KINDS and self.method == "GET" and self.status in (200, 206)

    def matches(self, pattern: str) -> bool:
        """Whether the glob ``pattern`` fits the path, the file, or repository/file."""
        names = [self.path, self.path.lstrip("/")]
        if self.file is not None:
            names += [self.file, f"{self.repo}/{self.file}"]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)


class Log:
    """The rows so far, in the order in which requests began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        with self._lock:
            self._rows.append(row)

    def clear(self) -> None:
        with self._lock:
            self._rows = []

    @property
    def rows(self) -> list[Row]:
        with self._lock:
            return list(self._rows)

    def pulled_bytes(self, pattern: str = "*") -> int:
        return sum(row.sent_bytes for row in self.rows if row.is_content and row.matches(pattern))

    def pushed_bytes(self) -> int:
        return sum(row.received_bytes for row in self.rows if row.kind == "put")

    def summary(self) -> dict[str, Any]:
        """Return totals, over all and for each kind and file, as JSON can hold them."""
        requests: Counter[str] = Counter()
        pulled: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        for row in self.rows:
            requests[row.kind] += 1
            if row.is_content:
                pulled[f"{row.repo}/{row.file}"] += row.sent_bytes
            if row.fault is not None:
                faults[row.fault] += 1
        return {
            "requests": dict(requests),
            "pulled_bytes": self.pulled_bytes(),
            "pushed_bytes": self.pushed_bytes(),
            "pulled_bytes_of": dict(pulled),
            "faults": dict(faults),
        }

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]
