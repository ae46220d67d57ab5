"""Files and folders that are either whole under their final name or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from kifmerge.errors import RunError, TryAgainError

_TEMPORARY_PREFIX = ".unfinished-"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it to disk and rename it there.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` is untouched.

    Raises:
        TryAgainError: the disk is full.
    """
    with _unfinished_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on success flush all of it and rename it there.

    With ``overwrite`` an earlier folder or file goes at that moment, and not before.

    Raises:
        RunError: ``path`` exists already and holds something.
        TryAgainError: the disk is full.
    """
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not overwrite:
        raise RunError(f"{path} exists already: it will not be overwritten")
    with _unfinished_folder(path) as folder:
        temporary = folder / "new" / path.name
        temporary.mkdir(parents=True)
        yield temporary
        for inner in [*temporary.rglob("*"), temporary]:
            flush(inner)
        if path.exists():
            path.rename(folder / "replaced")
        temporary.rename(path)
        flush(path.parent)


@contextlib.contextmanager
def disk_errors(path: Path, what_is_kept: str) -> Iterator[None]:
    """Turn a full disk into an error that says so.

    Raises:
        TryAgainError: the disk is full.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise TryAgainError(f"disk full while writing {path}: {what_is_kept}") from error


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process left under temporary names directly in ``directory``."""
    for leftover in directory.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _unfinished_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, removed with all that is left in it, whatever happens.

    A folder even for one file: libraries that write it may put temporary files of their own beside.
    """
    folder: Path | None = None
    try:
        with disk_errors(path, "nothing was kept of it"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            prefix = f"{_owner_prefix()}{os.getpid()}-"
            folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
            yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _owner_prefix() -> str:
    """Begin of the names of temporary folders made on this machine; the process follows."""
    machine = "".join(c for c in platform.node() if c.isalnum()) or "local"
    return f"{_TEMPORARY_PREFIX}{machine}-"


def _remove_abandoned(directory: Path) -> None:
    """Remove what processes of this machine left in a folder that are there no more."""
    for leftover in directory.glob(f"{_owner_prefix()}*"):
        number = leftover.name.removeprefix(_owner_prefix()).partition("-")[0]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
