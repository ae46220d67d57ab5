"""Ranks: several processes that share a work, forked here as torchrun would, or started by it."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults

from kifmerge import cli
from kifmerge.checkpoint import joined_ranks, ranks, shared_folder, watch
from kifmerge.checkpoint.ranks import Ranks

TESTS = Path(__file__).parent
# rank, and what sends a line of JSON to the test.
Say = Callable[[Any], None]


@dataclass(frozen=True)
class Said:
    """How a command ended on one rank."""

    code: int
    out: str
    err: str


def start(
    num_ranks: int,
    work: Callable[[int, Say], None],
    *,
    on_change: Mapping[int, faults.OnChange] | None = None,
) -> list[faults.Child]:
    """Fork so many ranks, each as if it were alone on its machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def as_rank(rank: int) -> Callable[[Say], None]:
        def run(say: Say) -> None:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(num_ranks),
                LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            watch.BEAT_SECONDS, watch.SILENCE_SECONDS = 0.05, 1.5
            shared_folder.MOST_LATE_SECONDS = joined_ranks.GONE_SECONDS = 0.5
            work(rank, say)

        return run

    return [faults.fork(as_rank(rank), (on_change or {}).get(rank)) for rank in range(num_ranks)]


def together(num_ranks: int, work: Callable[[Ranks, Say], None]) -> list[faults.Ended]:
    """Let ranks do some work in one group, to its good end."""

    def join(rank: int, say: Say) -> None:
        with ranks.joined_ranks() as joined:
            work(joined, say)

    ended = [child.end() for child in start(num_ranks, join)]
    assert [end.code for end in ended] == [0] * num_ranks
    return ended


def command(
    num_ranks: int,
    arguments: Sequence[Any] | Callable[[int], Sequence[Any]],
    *,
    prepare: Callable[[int], None] = lambda rank: None,
    on_change: Mapping[int, faults.OnChange] | None = None,
    on_start: Callable[[list[faults.Child]], None] = lambda children: None,
) -> list[Said]:
    """Call the command line on every rank.

    Args:
        num_ranks: how many.
        arguments: of all of them, or of each.
        prepare: called in each process beforehand.
        on_change: what is told of the changes of the disk by a rank.
        on_start: is given all ranks when they run.
    """

    def call(rank: int, say: Say) -> None:
        prepare(rank)
        given = arguments(rank) if callable(arguments) else arguments
        code, out, err = in_process(given)
        say([out, err])
        os._exit(code)

    children = start(num_ranks, call, on_change=on_change)
    on_start(children)
    ended = [child.end() for child in children]
    return [Said(end.code, *(end.said() if end.text else ("", ""))) for end in ended]


def in_process(arguments: Sequence[Any]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process, tracebacks included."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.app([str(argument) for argument in arguments])
            code: Any = 0
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001 (as the interpreter does at the end)
            sys.excepthook(*sys.exc_info())
            code = 1
    return code or 0, out.getvalue(), err.getvalue()


def told_once(told: Sequence[Said]) -> str:
    """What stderr got from the only rank that wrote to it."""
    (err,) = [said.err for said in told if said.err]
    return err


def torchrun(
    folder: Path, *arguments: object, num_ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    """Call something under PyTorch's own launcher, in a folder."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(num_ranks), *map(str, arguments),
    ]  # fmt: skip
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
