"""Files and folders that are either whole under their final name or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kifmerge.errors import RunError, TryAgainError

_TEMPORARY_PREFIX = ".unfinished-"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it to disk and rename it there.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` is untouched.

    Raises:
        TryAgainError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY_PREFIX)
    os.close(handle)
    temporary = Path(name)
    with _full_disk_named(path):
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _flush(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on success flush all of it and rename it there.

    Raises:
        RunError: ``path`` exists already.
        TryAgainError: the disk is full.
    """
    if path.exists():
        raise RunError(f"{path} exists already: it will not be overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_TEMPORARY_PREFIX))
    temporary.chmod(0o777 & ~_umask())
    with _full_disk_named(path):
        try:
            yield temporary
            for inner in [*temporary.rglob("*"), temporary]:
                _flush(inner)
            temporary.rename(path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process left under temporary names directly in ``directory``."""
    for leftover in directory.glob(f"{_TEMPORARY_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TryAgainError(
                f"disk full while writing {path}: nothing was kept of it"
            ) from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
