"""Merges of folders that are in repositories too: the same command, from here and from the Hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import merges
import pytest
from loopback import LoopbackHub, Row
from typer.testing import CliRunner

from kifmerge.cli import app
from kifmerge.hub import background, client, stream

# Several files, each of several of the small blocks below; a tensor that fills more than one.
SHAPES = {
    "a.weight": (60, 50), "a.bias": (60,), "b.weight": (30, 40), "b.empty": (0, 3),
    "c.weight": (48, 32), "c.bias": (), "d.weight": (21, 33), "d.bias": (21,), "e.weight": (77,),
}  # fmt: skip
NUM_SHARDS = 3
CHANGES = ("create", "branch", "put", "commit", "verify", "complete")
TOKENS = "loopback-token"


def be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that tiny models have many, and hardly a wait between attempts."""
    monkeypatch.setattr(stream, "HEAD_BYTES", 64)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.002)


@dataclass
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What was told on stderr."""
        return self.err.splitlines()

    def json(self) -> dict[str, Any]:
        """What was printed for scripts."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def kifmerge(*arguments: object) -> Result:
    """Call a command in this process; it may fail, but never by a bug."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    expected = isinstance(result.exception, SystemExit | None)
    assert expected, f"{arguments}: {result.exception!r}\n{result.output}"
    assert TOKENS not in result.output
    return Result(result.exit_code, result.stdout, result.stderr)


@dataclass
class Published:
    """Folders on this disk, each of them in a repository ``org/NAME`` as well.

    Attributes:
        folder: that holds them.
        hub: the server.
        options: of the merge, but for what it reads and makes.
        roles: option -> name of a folder, in order.
    """

    folder: Path
    hub: LoopbackHub
    options: Sequence[object]
    roles: Sequence[tuple[str, str]]
    commits: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Publish."""
        for _, name in self.roles:
            if name not in self.commits:
                self.commits[name] = self.hub.add_repo(f"org/{name}", self.folder / name)
        self.hub.clear_log()

    def arguments(self, place: str = "org/") -> list[object]:
        """Of the command, all folders being in one place."""
        inputs = [part for role, name in self.roles for part in (role, f"{place}{name}")]
        return ["merge", *self.options, *inputs]

    def run(self, out: object, *more: object, place: str = "org/") -> Result:
        """Merge what is on the Hub."""
        return kifmerge(*self.arguments(place), "--out", out, *more)

    def local(self, *more: object) -> dict[str, bytes]:
        """Files of a merge of what is here."""
        out = self.folder / "local"
        result = self.run(out, *more, place=f"{self.folder}/")
        assert result.code == 0, result.err
        found = faults.content(out)
        shutil.rmtree(out)
        return found

    def weight_bytes(self, *names: str) -> int:
        """Of the safetensors files in the folders, or in all."""
        wanted = names or [name for _, name in self.roles]
        return sum(
            path.stat().st_size
            for name in wanted
            for path in (self.folder / name).glob("*.safetensors")
        )

    def pulled(self, *names: str) -> int:
        """Bytes of safetensors files that were pulled, of some repositories or of all."""
        patterns = [f"org/{name}/*.safetensors" for name in names] or ["*.safetensors"]
        return sum(map(self.hub.pulled_bytes, patterns))


def two_sided(
    folder: Path, hub: LoopbackHub, evidence: str = "importance", **options: Any
) -> Published:
    """A base in shards, a new and a historical model, and what is known of both."""
    files = merges.Files(folder).write(
        shapes=SHAPES, shards=(NUM_SHARDS, NUM_SHARDS, 0), snapshot_shards=2, **options
    )
    if evidence == "masks":
        files.make_masks()
    if evidence == "units":
        files.make_units()
    end = merges.ENDS[evidence]
    roles = [("--base", "base"), *((f"--{role}", role) for role in merges.TWO)]
    roles += [(f"--{role}-{end}", f"{role}-{end}") for role in merges.TWO]
    return Published(folder, hub, ("--rule", "recurrent-kif"), roles)


def several(
    folder: Path, hub: LoopbackHub, rule: str = "linear", *options: object, num: int = 3
) -> Published:
    """Any number of models, and a base where the rule needs one."""
    roles = merges.roles_of(num)
    merges.Files(folder, roles).write(shapes=SHAPES, shards=(NUM_SHARDS, 0, 2, 1)[: num + 1])
    base = [] if rule == "linear" else [("--base", "base")]
    inputs = [*base, *(("--model", role) for role in roles)]
    return Published(folder, hub, ("--rule", rule, *options), inputs)


def same_model(
    found: dict[str, bytes], expected: dict[str, bytes], *, by_commit: Sequence[str] = ()
) -> None:
    """The same files, but for what tells from where the inputs came.

    Args:
        found: path -> content.
        expected: of a merge of folders here.
        by_commit: roles on the Hub that are known by their commit alone.
    """
    told = {"kifmerge.json", "README.md"}
    assert found.keys() == expected.keys()
    for name in expected.keys() - told:
        assert found[name] == expected[name], name
    ours, theirs = (json.loads(one["kifmerge.json"]) for one in (found, expected))
    assert ours["files"] == theirs["files"]
    parents = theirs["made_by"]["parents"]
    wanted = {role: None if role in by_commit else p["digest"] for role, p in parents.items()}
    parents = ours["made_by"]["parents"]
    assert {role: parent["digest"] for role, parent in parents.items()} == wanted


def content_of(hub: LoopbackHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """Path -> content of the files of a branch, but for git's own."""
    # What was sent just before a command ended may be committed at this very moment.
    commit = hub.head(repo_id, revision)
    paths = hub.paths(repo_id, commit)
    return {p: hub.read(repo_id, p, commit) for p in paths if p != ".gitattributes"}


def but_for_card(files: dict[str, bytes]) -> dict[str, bytes]:
    """All files but the card, which names the repository that it is in."""
    return {name: content for name, content in files.items() if name != "README.md"}


def is_change(row: Row) -> bool:
    """Whether a request asks to change something."""
    return row.kind in CHANGES and row.method in ("POST", "PUT", "DELETE")


@contextlib.contextmanager
def at_each_request(hub: LoopbackHub, call: Callable[[Row], None]) -> Iterator[None]:
    """Call when a request has come, before the server does what it asks for."""
    log = hub._shared.log
    add = log.add

    def told(row: Row) -> None:
        call(row)
        add(row)

    log.add = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        del log.add


@contextlib.contextmanager
def at_change(hub: LoopbackHub, number: int, call: Callable[[], None]) -> Iterator[None]:
    """Call when that many requests that change something have come, the last one not done yet."""
    left = [number]

    def count(row: Row) -> None:
        if is_change(row):
            left[0] -= 1
            if left[0] == 0:
                call()

    with at_each_request(hub, count):
        yield


def press_ctrl_c() -> None:
    """In this process."""
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def nothing_left_running() -> Iterator[None]:
    """Wait in the end until what nobody waits for any more is over."""
    wait_for_threads()
    yield
    wait_for_threads()


def wait_for_threads() -> None:
    """Wait until all threads of the client's own have nothing to do."""
    num = background._NUM_THREADS
    together = threading.Barrier(num)
    for future in [background.in_background(together.wait) for _ in range(num)]:
        future.result()
    faults.wait_for(lambda: _num_threads() <= num)


def _num_threads() -> int:
    return sum(thread.name == "kifmerge-hub" for thread in threading.enumerate())


class Watched:
    """What a reader of a branch sees, and what lies on the disk, at each request.

    Attributes:
        heads: commits of the branch, each once, in order.
        most_bytes: of weights in the temporary folder at once.
    """

    def __init__(self, hub: LoopbackHub, repo_id: str, branch: str = "main") -> None:
        self._hub, self._repo_id, self._branch = hub, repo_id, branch
        self.heads: list[str] = []
        self.most_bytes = 0

    def see(self, row: Row | None = None) -> None:
        """Look."""
        with contextlib.suppress(KeyError):
            head = self._hub.head(self._repo_id, self._branch)
            if head not in self.heads:
                self.heads.append(head)
        self.most_bytes = max(self.most_bytes, temporary_bytes())


def temporary_bytes() -> int:
    """Of the tensors that merges have on the disk before they are sent."""
    num_bytes = 0
    # Files and folders may go while they are looked at: os.walk passes over those.
    for top in Path(tempfile.gettempdir()).glob("kifmerge-*"):
        for folder, _, names in os.walk(top):
            for path in (Path(folder, name) for name in names if name.endswith(".safetensors")):
                with contextlib.suppress(FileNotFoundError):
                    with path.open("rb") as stream:
                        header = stream.read(8)
                    num_bytes += path.stat().st_size - 8 - int.from_bytes(header, "little")
    return num_bytes


def temporary_names() -> list[str]:
    """Of what lies in the temporary folder."""
    return sorted(path.name for path in Path(tempfile.gettempdir()).iterdir())
