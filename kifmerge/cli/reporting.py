"""What commands that work on files tell on stderr, and how they end."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kifmerge.cli.output import print_mapping

if TYPE_CHECKING:
    from kifmerge.checkpoint.folder import Folders
    from kifmerge.checkpoint.ranks import Ranks
    from kifmerge.hub.folder import Fetch


def opener(fetch: Fetch, *, quiet: bool, ranks: Ranks | None = None) -> Folders:
    """What opens references; talks on stderr, unless quiet.

    Of several ranks the first alone talks, and what is on the Hub is downloaded: each streams but a
    part of a file, of which nobody could tell whether it is the repository's.
    """
    from kifmerge.checkpoint.folder import Folders

    if ranks is not None and ranks.size > 1:
        if fetch == "stream":
            raise typer.BadParameter("several processes download: --fetch stream is for one")
        fetch, quiet = "download", quiet or not ranks.is_first
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    return Folders(fetch, _hush if quiet else _say)


def _say(text: str) -> None:
    typer.echo(f"kifmerge: {text}", err=True)


def _hush(text: str) -> None:
    pass


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """Look seldom for garbage: libraries and headers make many objects, and all of them stay.

    Measured: a third of what starting a merge takes beyond importing torch.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def ranks_of_command(*, dry_run: bool) -> Iterator[Ranks]:
    """The ranks that share the work of a command; what would be done rank 0 alone looks up."""
    from kifmerge.checkpoint.ranks import ALONE, is_first_started, joined_ranks

    if dry_run and not is_first_started():
        raise typer.Exit
    with contextlib.nullcontext(ALONE) if dry_run else joined_ranks() as ranks:
        yield ranks


def workers_of_rank(workers: int | None, ranks: Ranks) -> int | None:
    """Threads of one rank, where they are not told: ranks of one machine share its processors."""
    if workers is not None or ranks.num_local == 1:
        return workers
    from kifmerge.checkpoint.workers import num_processors

    return max(num_processors() // ranks.num_local, 1)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Options that do not fit together are a mistake of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def reporting(
    phase: str, total: int, *, quiet: bool, is_first: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show progress on a terminal, and warnings as plain lines, both on stderr.

    Args:
        phase: what is being done.
        total: parameters to go through.
        quiet: show no progress.
        is_first: of several ranks, those that are not say nothing at all.
    """
    done, shown = 0, -1
    on_terminal = sys.stderr.isatty() and not quiet and is_first

    def on_progress(num_parameters: int) -> None:
        nonlocal done, shown
        done += num_parameters
        percent = 100 * done // max(total, 1)
        if on_terminal and percent > shown:
            shown = percent
            typer.echo(f"\r{phase} {percent:3d} %", err=True, nl=False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield on_progress
    if on_terminal and shown >= 0:
        typer.echo(err=True)
    for warning in caught if is_first else ():
        typer.echo(f"kifmerge: warning: {warning.message}", err=True)


def print_result(
    out: Path | str, figures: dict[str, Any], *, is_new: bool, json_output: bool, quiet: bool
) -> None:
    """Print what was made, on stdout; that it was made before, on stderr."""
    if not is_new and not quiet:
        typer.echo(f"{out} is already made: nothing to do", err=True)
    print_mapping({"out": str(out), **figures}, json_output=json_output)
